#!/bin/sh
# Lets the running tallyd hand over to the executable that was just installed, so that an upgrade loses no datagram; a
# restart where that does not happen within 180 s. Does nothing where tallyd does not run, is masked, or is not run by
# systemd. The packages' scripts call it after an upgrade, and whoever installed an executable by hand may.
set -eu

unit=tallyd.service
# As long as the agent itself waits for a successor, its own last flush included.
patience=180

property() { systemctl show --property="$1" --value "$unit"; }

# As the unit runs it: by its user, who may read and write other things than root, in its environment, as systemd reads
# that, and with the same directories. Its credentials it alone has; what is one is not looked at.
check() {
  systemd-run --quiet --wait --pipe --collect \
    -p "User=$(property User)" -p "Group=$(property Group)" \
    -p "SupplementaryGroups=$(property SupplementaryGroups)" \
    -p StateDirectory=tallyd -p StateDirectoryMode=0700 -p ProtectSystem=strict \
    -p "ReadWritePaths=-/run/tallyd $(property ReadWritePaths)" \
    -p EnvironmentFile=-/etc/default/tallyd \
    /usr/bin/tallyd check --config /etc/tallyd/tallyd.toml </dev/null
}

[ -d /run/systemd/system ] || exit 0
# The administrator's policy, as every package's restart heeds it: 101 forbids it.
if [ -x /usr/sbin/policy-rc.d ]; then
  forbidden=0
  /usr/sbin/policy-rc.d "$unit" restart >/dev/null 2>&1 || forbidden=$?
  [ "$forbidden" -ne 101 ] || exit 0
fi
[ "$(property LoadState)" = loaded ] || exit 0
case "$(property ActiveState)" in active | reloading) ;; *) exit 0 ;; esac
before=$(property MainPID)

# systemd before 252 knows the option by its old name.
if [ "$before" != 0 ] && {
  systemctl kill --kill-whom=main -s USR2 "$unit" 2>/dev/null || systemctl kill --kill-who=main -s USR2 "$unit"
}; then
  deadline=$(($(date +%s) + patience))
  while [ "$(date +%s)" -lt "$deadline" ]; do
    now=$(property MainPID)
    state=$(property ActiveState)
    if [ "$state" = active ] && [ "$now" != 0 ] && [ "$now" != "$before" ]; then exit 0; fi
    # Nobody is left who could hand over, or be handed over to.
    case "$state" in inactive | failed) break ;; esac
    case "$(property StatusText)" in "nobody took over"*) break ;; esac
    sleep 0.2
  done
fi

# What the new executable refuses would end the service: then it goes on as it is, and its administrator has the word.
if ! wrong=$(check 2>&1); then
  echo "tallyd: $unit goes on with the executable from before, since the new one refuses its configuration: $wrong" >&2
  exit 0
fi

echo "tallyd: nobody took over from process $before; restarting $unit" >&2
if command -v deb-systemd-invoke >/dev/null 2>&1; then
  exec deb-systemd-invoke restart "$unit"
fi
exec systemctl restart "$unit"
