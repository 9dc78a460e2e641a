#!/usr/bin/env bash
# Tries the package in real Debian systems, booted with systemd as PID 1 in containers that have no network but loopback:
# installs, drives, breaks, upgrades and removes it, and says of each thing whether it was as it should be.
#
#   packaging/try.sh [--release NAME]... [OLD.deb NEW.deb]
#
# NEW is the same code with a higher version. Without packages packaging/deb.sh makes both. Releases: bookworm and trixie
# (Debian 12 and 13). Their systems are made once by debootstrap and kept in ${TRY_CACHE:-/var/tmp/tallyd-try}; what
# is done to them lies in memory and is gone with each run. Needs root, and installs what it needs. The last line is
# `N passed, N failed, N skipped`; the exit code is 1 when something failed. Takes about four minutes for each release.
set -uo pipefail

# --- what both sides know: this script runs on the host, and then itself inside of each system.

passed=0
failed=0
skipped=0
release=

say() { printf '%s\n' "$*"; }
ok() { passed=$((passed + 1)) && say "ok     $release: $*"; }
not_ok() { failed=$((failed + 1)) && say "not ok $release: $*"; }
skip() { skipped=$((skipped + 1)) && say "skip   $release: $*"; }

# is WHAT FOUND WANTED: both are the same.
is() { if [ "$2" = "$3" ]; then ok "$1: $2"; else not_ok "$1: $2, not $3"; fi; }

# has WHAT TEXT PATTERN: the text matches the extended regular expression; the part that does is shown.
has() {
  local found
  found=$(grep -Eo -m1 -- "$3" <<<"$2" | head -1)
  if [ -n "$found" ]; then ok "$1: $found"; else not_ok "$1: nothing like /$3/ in: $(head -c 600 <<<"$2")"; fi
}

# succeeds WHAT COMMAND...: it ends with 0. What it wrote is shown when it does not.
succeeds() {
  local what=$1 code=0 text
  shift
  text=$("$@" 2>&1) || code=$?
  if [ "$code" = 0 ]; then ok "$what"; else not_ok "$what: ended with $code: $(tail -c 600 <<<"$text")"; fi
}

# until_true SECONDS COMMAND...: tries it every fifth of a second.
until_true() {
  local deadline=$(($(date +%s) + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$(date +%s)" -lt "$deadline" ] || return 1
    sleep 0.2
  done
}

# becomes WHAT SECONDS COMMAND...: it comes true in time.
becomes() {
  local what=$1 seconds=$2
  shift 2
  if until_true "$seconds" "$@"; then ok "$what"; else not_ok "$what: not within $seconds s"; fi
}

# --- inside: what an operator sees.

unit=tallyd.service
api=http://127.0.0.1:7000
conf=/etc/tallyd/tallyd.toml

property() { systemctl show -p "$1" --value "${2:-$unit}"; }
main_pid() { property MainPID; }
is_active() { [ "$(property ActiveState)" = active ]; }
# is_another PID: the service is up, as another process. What it is asked comes in one answer.
is_another() {
  local ActiveState MainPID
  eval "$(systemctl show -p ActiveState -p MainPID $unit)"
  [ "$ActiveState" = active ] && [ "$MainPID" -gt 1 ] && [ "$MainPID" != "$1" ]
}
# send SIGNAL PID: not to ourselves, should there be no process.
send() { [ "$2" -gt 1 ] && kill "-$1" "$2"; }
status_has() { grep -Eq -- "$1" <<<"$(property StatusText)"; }
# value KEY FIELD: of a metric, by the API.
value() { curl -sf -m 5 "$api/data/metrics/$1" | jq -r ".$2"; }
has_value() { [ "$(value "$1" value)" = "$2" ]; }
# durable KEY INCREMENT: counts it by HTTP, once it is in the journal.
durable() {
  curl -sf -m 10 -H 'Content-Type: application/json' -d "{\"name\":\"$1\",\"type\":\"COUNTER\",\"value\":$2}" \
    'http://127.0.0.1:8000/ingest/metrics?durable=1' >/dev/null
}
own() { curl -sf -m 5 "$api/metrics" | awk -v name="$1" 'index($1, name) == 1 { sum += $NF } END { printf "%d", sum }'; }
ready_says() { curl -s -m 5 "$api/-/ready" | grep -Eq -- "$1"; }
# A mark in the journal, to look at what is logged later.
mark() { journalctl --sync 2>/dev/null; date +%s.%N; }
logged() { journalctl --sync 2>/dev/null; journalctl -u "$unit" --since "@$1" -o cat --no-pager; }
was_logged() { logged "$1" | grep -Eq -- "$2"; }
version() { dpkg-query -W -f '${Version}' tallyd; }
apt() { DEBIAN_FRONTEND=noninteractive apt-get -y -q -o Dpkg::Options::=--force-confold "$@"; }

# drop_in NAME TEXT: a change of the service, as `systemctl edit` makes it; without text it goes.
drop_in() {
  mkdir -p "/etc/systemd/system/$unit.d"
  if [ $# -gt 1 ]; then
    printf '%s\n' "$2" >"/etc/systemd/system/$unit.d/$1.conf"
  else
    rm -f "/etc/systemd/system/$unit.d/$1.conf"
  fi
  systemctl daemon-reload
}

# The kernel's count of datagrams that it dropped at the sockets there are for a port.
kernel_drops() {
  local port
  port=$(printf ':%04X' 8125)
  cat /proc/net/udp /proc/net/udp6 | awk -v port="$port" 'index($2, port) { sum += $NF } END { print sum + 0 }'
}

# How many lines of a load were counted: its counters carry the value 1.
counted() {
  local page url="$api/data/metrics?match=$1.*&limit=10000"
  page=$(curl -sf -m 20 "$url") || return 1
  jq '[.[].value] | add // 0' <<<"$page"
}
all_counted() { [ "$(counted "$1")" -ge "$2" ]; }

# load NAME SECONDS: 100,000 lines a second in full packets, 70 series of one length; prints what was sent, as JSON.
load() {
  tallyd bench --to udp://127.0.0.1:8125 --rate 100000 --time "$2s" --senders 4 --series 70 --mix c=100 --name "$1" --json
}

# under_load WHAT NAME COMMAND...: the command in the middle of a load of eight seconds, and what became of the load.
under_load() {
  local what=$1 name=$2 sent packets drops lost most code=0 before
  shift 2
  before=$(kernel_drops)
  load "$name" 8 >"/run/$name.json" 2>"/run/$name.err" &
  local bench=$!
  sleep 3
  "$@" >"/run/$name.log" 2>&1 || code=$?
  if [ "$code" = 0 ]; then ok "$what: done"; else not_ok "$what: ended with $code: $(tail -c 600 "/run/$name.log")"; fi
  wait "$bench" || not_ok "$what: the load ended with $?: $(tail -1 "/run/$name.err")"
  sent=$(jq .lines "/run/$name.json")
  packets=$(jq .packets "/run/$name.json")
  if [ -z "$sent" ]; then not_ok "$what: there was no load" && return; fi
  until_true 20 is_active
  until_true 10 all_counted "$name" "$sent"
  drops=$(($(kernel_drops) - before))
  lost=$(counted "$name") && lost=$((sent - lost)) || { not_ok "$what: nobody says what was counted" && return; }
  # Full packets have as many lines as fit; a sender's last one may have fewer.
  most=$((drops * (1 + sent / packets * 11 / 10)))
  local figures="$sent lines sent in $packets packets, $lost not counted, $drops packets dropped by the kernel"
  if { [ "$drops" = 0 ] && [ "$lost" = 0 ]; } || { [ "$lost" -ge "$drops" ] && [ "$lost" -le "$most" ] && [ "$drops" -gt 0 ]; }; then
    ok "$what: $figures"
  else
    not_ok "$what: $figures"
  fi
}

try_install() {
  succeeds "apt-get install $(basename /try/old.deb)" apt install /try/old.deb
  is "installed version" "$(version)" "$(dpkg-deb -f /try/old.deb Version)"
  becomes "active after the installation" 20 is_active
  is "enabled" "$(systemctl is-enabled $unit)" enabled
  has "status line" "$(property StatusText)" '^ready; [0-9]+ samples/s, [0-9]+ series, journal [0-9.]+ MiB'
  is "user" "$(ps -o user= -p "$(main_pid)")" tallyd
  is "state directory" "$(stat -c '%U %a' /var/lib/tallyd)" "tallyd 700"
  is "journal" "$(stat -c '%U %a' /var/lib/tallyd/journal.redb)" "tallyd 600"
  succeeds "units are well-formed" systemd-analyze verify --man=no $unit tallyd.socket tallyd-ingest.socket tallyd-api.socket
  local figure
  figure=$(systemd-analyze security --no-pager $unit | sed -n 's/.*Overall exposure level for [^:]*: \([0-9.]*\).*/\1/p')
  if awk -v f="${figure:-9}" 'BEGIN { exit !(f <= 1.5) }'; then
    ok "systemd-analyze security: $figure, 1.5 at most"
  else
    not_ok "systemd-analyze security: $figure, 1.5 at most"
  fi
  has "the sandbox has no capability" "$(cat "/proc/$(main_pid)/status")" 'CapBnd:[[:space:]]0{16}$'
  is "system calls are filtered" "$(awk '/^Seccomp:/ { print $2 }' "/proc/$(main_pid)/status")" 2
}

try_lines() {
  printf 'try.udp:3|c\ntry.udp:4|c\n' | nc -u -q0 127.0.0.1 8125
  becomes "lines by nc -u -q0: try.udp is 7" 10 has_value try.udp 7
  printf 'try.udp6:2|c\n' | nc -6 -u -q0 ::1 8125
  becomes "lines by IPv6: try.udp6 is 2" 10 has_value try.udp6 2
  printf 'try.tcp:5|c\n' | nc -q0 -N 127.0.0.1 8125
  becomes "lines by TCP: try.tcp is 5" 10 has_value try.tcp 5
  succeeds "JSON by HTTP" durable try.http 9
  is "JSON by the API" "$(value try.http value)" 9
  has "scrape" "$(curl -sf -m 5 $api/metrics)" '^try_udp 7$'
  has "scrape says when the process began" "$(curl -sf -m 5 $api/metrics)" '^process_start_time_seconds [0-9.e+]+$'
  has "ready" "$(curl -s -m 5 $api/-/ready)" '"ready":true'
  local refused
  refused=$(own 'tallyd_lines_rejected_total')
  printf 'no line\n' | nc -u -q0 127.0.0.1 8125
  becomes "a line that is none is counted as rejected" 10 eval "[ \$(own tallyd_lines_rejected_total) -gt $refused ]"
}

try_unix() {
  drop_in unix '[Service]
Environment=TALLYD_LISTEN__UNIXGRAM=/run/tallyd/lines.sock'
  systemctl restart $unit
  becomes "a unix socket in the runtime directory" 10 test -S /run/tallyd/lines.sock
  printf 'try.unix:6|c\n' | nc -u -U -q0 -w1 /run/tallyd/lines.sock
  becomes "lines by the unix socket: try.unix is 6" 10 has_value try.unix 6
  drop_in unix
  systemctl restart $unit
}

try_journal() {
  local entry error
  entry=$(journalctl -u $unit -o json --no-pager | jq -c 'select(.TALLYD_DIRECTORY)' | tail -1)
  has "the journal is told of" "$(jq -r .MESSAGE <<<"$entry")" '^the journal is open agent=[0-9a-f]{32} .*directory=/var/lib/tallyd'
  is "its fields stand apart" "$(jq -r '[.TALLYD_DIRECTORY, .PRIORITY, .SYSLOG_IDENTIFIER, ._SYSTEMD_UNIT] | join(" ")' <<<"$entry")" \
    "/var/lib/tallyd 6 tallyd $unit"
  has "the line of standard error is there too" "$(journalctl -u $unit -o cat --no-pager)" '^ready api=127.0.0.1:7000 '
  error=$(journalctl -u $unit -p err -o cat --no-pager)
  is "errors so far" "$error" ""
}

try_reload() {
  local pid since before
  pid=$(main_pid)
  printf '[log]\nlevel = "debug"\n' >$conf
  since=$(mark)
  succeeds "systemctl reload of a good configuration" systemctl reload $unit
  becomes "the status line says so" 10 status_has '^the configuration was read again|^ready; '
  becomes "it was read" 10 was_logged "$since" 'the configuration was read again changed="?log.level'

  printf '[log]\nlevel = "loud"\n' >$conf
  since=$(mark)
  before=$(value try.udp value)
  if systemctl reload $unit 2>/dev/null; then
    not_ok "systemctl reload of a wrong configuration: it did not fail"
  else
    ok "systemctl reload of a wrong configuration fails"
  fi
  becomes "the reason is in the journal" 10 was_logged "$since" 'log.level = "loud"'
  is "it runs on" "$(property ActiveState) $(main_pid) $(value try.udp value)" "active $pid $before"

  printf '[flush]\nwindow = "20s"\n' >$conf
  since=$(mark)
  succeeds "systemctl reload of what needs a restart" systemctl reload $unit
  becomes "the status line says that it was refused" 10 status_has 'reload (was )?refused: flush.window: changes only with a restart'
  becomes "so does the journal" 10 was_logged "$since" 'the configuration is refused: flush.window'
  has "as an error" "$(journalctl -u $unit -p err -o cat --no-pager)" 'the configuration is refused: flush.window'
  is "it runs on" "$(property ActiveState) $(main_pid)" "active $pid"
  cp /run/tallyd.toml.installed $conf
  succeeds "and is reloaded again" systemctl reload $unit
}

try_watchdog() {
  local pid restarts since
  drop_in watchdog '[Service]
WatchdogSec=5'
  systemctl restart $unit
  pid=$(main_pid)
  sleep 16
  is "an agent that works lives under a watchdog of 5 s" "$(main_pid) $(property NRestarts)" "$pid $(property NRestarts)"
  restarts=$(property NRestarts)
  since=$(mark)
  send STOP "$pid"
  becomes "an agent that stands still is started again" 30 is_another "$pid"
  is "by systemd" "$(property NRestarts)" $((restarts + 1))
  becomes "since the watchdog got no sign" 10 was_logged "$since" 'Watchdog timeout|Failed with result .watchdog.'
  is "what was counted is there" "$(value try.udp value)" 7
  drop_in watchdog
}

# A disk that takes no more: the file system of the state directory is frozen.
try_frozen_disk() {
  if ! mountpoint -q /srv/disk; then
    skip "a disk that hangs: there is no loop device to freeze a file system on"
    return
  fi
  drop_in disk '[Service]
WatchdogSec=15
ReadWritePaths=/srv/disk
Environment=TALLYD_STATE_DIR=/srv/disk/state'
  # Another system that had this disk had other numbers of users.
  rm -rf /srv/disk/state
  install -d -o tallyd -g tallyd -m 700 /srv/disk/state
  systemctl restart $unit
  local pid since
  pid=$(main_pid)
  since=$(mark)
  durable try.disk 1
  fsfreeze -f /srv/disk
  printf 'try.disk:1|c\n' | nc -u -q0 127.0.0.1 8125
  becomes "with a disk that hangs counting goes on" 10 has_value try.disk 2
  becomes "/-/ready says what stands still" 20 ready_says '"stalled: flush for 1[0-9] s"'
  becomes "so does the status line" 5 status_has '^not ready: stalled: flush for'
  becomes "and the journal, before systemd ends it" 5 was_logged "$since" 'a part stands still part="?flush'
  becomes "the watchdog ends it" 30 was_logged "$since" 'Watchdog timeout'
  fsfreeze -u /srv/disk
  becomes "it is started again when the disk is back" 60 is_another "$pid"
  # The second sample may be in the flush that hung.
  has "with what was durable" "$(value try.disk value)" '^[12]$'
  drop_in disk
  systemctl restart $unit
}

try_kill() {
  local pid code=0
  pid=$(main_pid)
  for _ in 1 2 3 4 5; do durable try.durable 20 || code=$?; done
  is "five requests that are to be durable" "$code" 0
  send KILL "$pid"
  becomes "after kill -9 it is started again" 20 is_another "$pid"
  is "what was durable is exact" "$(value try.durable value)" 100
}

try_wrong_configuration() {
  local since restarts
  printf '[listen]\nudp = "here"\n' >$conf
  since=$(mark)
  if systemctl restart $unit 2>/dev/null; then
    not_ok "a start with a wrong configuration: it did not fail"
  else
    ok "a start with a wrong configuration fails"
  fi
  restarts=$(property NRestarts)
  sleep 6
  is "it is not tried again" "$(property ActiveState) $(property ExecMainStatus) $(property NRestarts)" "failed 78 $restarts"
  has "the reason is one line" "$(logged "$since")" '^tallyd: /etc/tallyd/tallyd.toml:2:.*listen.udp = "?here'
  has "and an error" "$(journalctl -u $unit -p err --since "@$since" -o cat --no-pager)" 'listen.udp'
  cp /run/tallyd.toml.installed $conf
  succeeds "a right one starts" systemctl start $unit
}

try_restart_under_load() {
  under_load "systemctl restart under 100,000 lines/s" restart systemctl restart $unit
  local stored
  stored=$(property NFileDescriptorStore)
  if [ "${stored:-0}" -gt 0 ]; then
    ok "systemd keeps the sockets: $stored descriptors"
  else
    not_ok "systemd keeps the sockets: $stored descriptors"
  fi
}

try_socket_units() {
  systemctl stop $unit
  succeeds "the socket units start" systemctl enable --now tallyd.socket tallyd-ingest.socket tallyd-api.socket
  printf 'try.down:8|c\n' | nc -u -q0 127.0.0.1 8125
  becomes "what comes while it is down starts it, and counts" 20 has_value try.down 8
  is "an address is systemd's" "$(own tallyd_receive_buffer_bytes | awk '{ print ($1 >= 4 * 8388608) }')" 1
  under_load "systemctl restart on sockets of units" units systemctl restart $unit
  succeeds "HTTP on a socket of a unit" durable try.http 1
  systemctl stop $unit tallyd.socket tallyd-ingest.socket tallyd-api.socket
  systemctl disable -q tallyd.socket tallyd-ingest.socket tallyd-api.socket
  succeeds "back to sockets of its own" systemctl start $unit
}

# readme FILE: the commands of its blocks `shell-session`, each with what it shows, as tab-separated lines; line feeds are \n.
readme() {
  awk '
    function put() { if (command != "") print command "\t" shown; command = ""; shown = "" }
    /^ *```shell-session$/ { inside = 1; indent = index($0, "`") - 1; next }
    inside && /^ *```$/ { put(); inside = 0; next }
    inside {
      line = substr($0, indent + 1)
      if (line ~ /^# /) { put(); command = substr(line, 3) } else shown = shown line "\\n"
    }' "$1"
}

# What the README shows; `...` stands for any text.
try_readme() {
  local command shown found pattern count=0
  while IFS=$'\t' read -r command shown; do
    count=$((count + 1))
    shown=$(printf '%b' "$shown")
    pattern=$(sed 's/[][\\*?]/\\&/g; s/\.\.\./*/g' <<<"$shown")
    found=$(bash -c "$command" 2>&1 </dev/null)
    # What was sent takes its time to be counted.
    if [[ $found != $pattern && $command == curl* ]]; then
      sleep 1.5
      found=$(bash -c "$command" 2>&1 </dev/null)
    fi
    if [[ $found == $pattern ]]; then
      ok "README: $command"
    else
      not_ok "README: $command: printed $found and the README shows $shown"
    fi
  done < <(readme /try/README.md)
  if [ "$count" -lt 5 ]; then not_ok "README: only $count commands"; fi
}

# A line whose first half comes before a change and its second after it, on one connection.
begin_line() { exec 9<>/dev/tcp/127.0.0.1/8125 && printf 'try.half:%s' "$1" >&9; }
end_line() { printf '1|c\n' >&9 && exec 9>&-; }

try_upgrade() {
  local pid since edited
  # An edit of the administrator, so that a stream may rest in the middle of a line on a slow machine too.
  sed -i 's/^#partial_line = .*/partial_line = "5m"/' $conf
  systemctl restart $unit
  edited=$(md5sum <$conf)
  pid=$(main_pid)
  since=$(mark)
  begin_line 4
  under_load "apt-get install of a newer version" upgrade apt install /try/new.deb
  end_line
  is "version" "$(version)" "$(dpkg-deb -f /try/new.deb Version)"
  if is_another "$pid"; then
    ok "another process is the service: $pid was, $(main_pid) is"
  else
    not_ok "another process is the service: $pid was, $(main_pid) is"
  fi
  is "it runs what was installed" "$(readlink "/proc/$(main_pid)/exe")" /usr/bin/tallyd
  if was_logged "$since" 'nobody took over|Stopping|Deactivated successfully'; then
    not_ok "without a stop: $(logged "$since" | grep -E 'nobody took over|Stopping|Deactivated' | head -1)"
  else
    ok "without a stop"
  fi
  becomes "a line that was cut in two by the upgrade counts once" 10 has_value try.half 41
  is "the edited conffile stays" "$(md5sum <$conf)" "$edited"
  has "status line" "$(property StatusText)" '^ready; '
  is "what was counted is there" "$(value try.udp value)" 7
}

# hand_over: another process of the same executable.
hand_over() {
  local pid
  pid=$(main_pid)
  systemctl kill --kill-whom=main -s USR2 $unit && until_true 60 is_another "$pid"
}

# A process that systemd has not started itself is served as one that it has.
try_hand_over() {
  local pid since
  under_load "SIGUSR2 by hand" handover hand_over
  under_load "systemctl restart of a process that took over" after systemctl restart $unit
  drop_in watchdog '[Service]
WatchdogSec=5'
  systemctl restart $unit
  succeeds "SIGUSR2 under a watchdog of 5 s" hand_over
  pid=$(main_pid)
  sleep 12
  is "the process that took over feeds it" "$(property ActiveState) $(main_pid)" "active $pid"
  since=$(mark)
  send STOP "$pid"
  becomes "and is started again when it stands still" 30 is_another "$pid"
  becomes "by the watchdog" 10 was_logged "$since" 'Watchdog timeout'
  succeeds "SIGUSR2 once more" hand_over
  pid=$(main_pid)
  send KILL "$pid"
  becomes "a process that took over is started again after kill -9" 20 is_another "$pid"
  drop_in watchdog
  systemctl restart $unit
}

try_downgrade() {
  succeeds "apt-get install of the older version" apt install --allow-downgrades /try/old.deb
  is "version" "$(version)" "$(dpkg-deb -f /try/old.deb Version)"
  becomes "active" 20 is_active
  is "what was counted is there" "$(value try.udp value)" 7
}

try_remove() {
  succeeds "apt-get remove" apt remove tallyd
  is "it is stopped" "$(pgrep -c -x tallyd)" 0
  is "configuration and figures stay" "$(ls -d /etc/tallyd/tallyd.toml /etc/default/tallyd /var/lib/tallyd/journal.redb 2>&1 | wc -l)" 3
  succeeds "it is installed again" apt install /try/old.deb
  becomes "active" 20 is_active
  is "what was counted is there" "$(value try.udp value)" 7
  succeeds "apt-get purge" apt purge tallyd
  local left
  left=$(find / -xdev -name '*tallyd*' -not -path '/proc/*' -not -path '/sys/*' -not -path '/try/*' \
    -not -path '/run/*' -not -path '/var/log/*' -not -path '/var/cache/*' -not -path '/tmp/*' 2>/dev/null | tr '\n' ' ')
  has "what is left after a purge is named" "left: ${left:-nothing}" 'left: .*'
  is "of it in /etc, /usr and /var/lib/tallyd" "$(grep -oE '/(etc|usr|lib|var/lib/tallyd)[^ ]*' <<<"$left" | grep -v "^/etc/systemd/system/$unit.d" | wc -l)" 0
  is "the system user stays, as Debian has it" "$(getent passwd tallyd | cut -d: -f1)" tallyd
}

inside() {
  release=$1
  shift
  export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  local only=${*:-install lines readme unix journal reload watchdog frozen_disk kill wrong_configuration restart_under_load socket_units upgrade hand_over downgrade remove}
  say "== $release: Debian $(cat /etc/debian_version), $(systemctl --version | head -1)"
  for part in $only; do
    say "-- $release: $part"
    "try_$part"
    if [ "$part" = install ]; then cp $conf /run/tallyd.toml.installed 2>/dev/null; fi
  done
  say "counts $passed $failed $skipped"
}

# --- the host: systems that are made once, booted, and ended.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${TRY_CACHE:-/var/tmp/tallyd-try}
work=
mounted=
containers=()

fail() {
  echo "try.sh: $*" >&2
  exit 69
}

# Ends a container: as it would be switched off, or at once when that takes too long.
end() {
  local nspawn=$1
  kill -TERM "$nspawn" 2>/dev/null || return 0
  until_true 20 eval "! kill -0 $nspawn" || kill -KILL "$nspawn" 2>/dev/null
  wait "$nspawn" 2>/dev/null
}

finish() {
  for nspawn in "${containers[@]}"; do end "$nspawn"; done
  if [ -n "$mounted" ]; then
    # In case a test ended while it was frozen.
    fsfreeze -u "$work/disk" 2>/dev/null
    umount "$work/disk"
  fi
  if [ -n "$work" ]; then rm -rf "$work"; fi
}

install_tools() {
  local missing=()
  command -v debootstrap >/dev/null || missing+=(debootstrap)
  command -v systemd-nspawn >/dev/null || missing+=(systemd-container)
  [ ${#missing[@]} -gt 0 ] || return 0
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >"$work/apt.log" 2>&1 || { tail -3 "$work/apt.log" >&2 && fail "apt-get could not install: ${missing[*]}"; }
}

# A system with systemd and what the tests and the package need; made once.
system() {
  local root=$cache/$release made=$cache/$release.making
  if [ ! -e "$root/.made" ]; then
    say "== making a system of $release in $root"
    rm -rf "$root" "$made"
    mkdir -p "$cache"
    debootstrap --variant=minbase \
      --include=systemd,systemd-sysv,dbus,init-system-helpers,apt-utils,ca-certificates,curl,jq,netcat-openbsd,procps \
      "$release" "$made" >"$work/debootstrap.log" 2>&1 || { tail -3 "$work/debootstrap.log" >&2 && return 1; }
    touch "$made/.made"
    mv "$made" "$root"
  fi
  # The container has no network, so what the package depends on is there before.
  local depends
  depends=$(dpkg-deb -f "$work/old.deb" Depends)
  [ -e "$root/.depends" ] && [ "$(cat "$root/.depends")" = "$depends" ] && return 0
  cp /etc/resolv.conf "$root/etc/resolv.conf" 2>/dev/null
  cp -r /etc/apt/apt.conf.d/. "$root/etc/apt/apt.conf.d/" 2>/dev/null
  chroot "$root" sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get satisfy -y -q --no-install-recommends "$1"' \
    sh "$depends" >"$work/depends.log" 2>&1 || { tail -3 "$work/depends.log" >&2 && return 1; }
  printf '%s' "$depends" >"$root/.depends"
}

# A file system that can be frozen without harm to others.
make_disk() {
  mkdir -p "$work/disk"
  truncate -s 128M "$work/disk.img"
  if mkfs.ext4 -q "$work/disk.img" 2>/dev/null && mount -o loop "$work/disk.img" "$work/disk" 2>/dev/null; then mounted=yes; fi
}

# in_system COMMAND...: inside of the booted system.
in_system() { nsenter -t "$leader" -m -u -i -n -p -C -- "$@"; }

boot() {
  local disk=()
  if [ -n "$mounted" ]; then disk=("--bind=$work/disk:/srv/disk"); fi
  # With cgroup 2 alone, whatever the host has: systemd 256 and later know nothing else.
  SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --quiet --register=no --keep-unit --private-network \
    --machine="tallyd-try-$release" --directory="$cache/$release" --volatile=overlay --bind-ro="$work:/try" "${disk[@]}" \
    --boot >"$work/boot.log" 2>&1 </dev/null &
  nspawn=$!
  containers+=("$nspawn")
  until_true 20 eval "leader=\$(pgrep -P $nspawn -x systemd)" || return 1
  leader=$(pgrep -P "$nspawn" -x systemd)
  until_true 60 eval 'in_system systemctl is-system-running | grep -Eq "^(running|degraded)$"'
}

try_release() {
  system || { not_ok "a system could be made" && return; }
  boot || { not_ok "systemd could be booted: $(tail -2 "$work/boot.log")" && return; }
  # Bounded, whatever happens inside.
  timeout -k 10 900 nsenter -t "$leader" -m -u -i -n -p -C -- env -i bash /try/try.sh --inside "$release" $parts 2>&1 |
    tee "$work/$release.log" | grep --line-buffered -v '^counts '
  local counts
  if counts=$(grep '^counts ' "$work/$release.log"); then
    read -r _ p f s <<<"$counts"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
  else
    not_ok "the tests came to their end"
  fi
  if [ -n "${TRY_LOGS:-}" ]; then
    mkdir -p "$TRY_LOGS"
    in_system journalctl --no-pager >"$TRY_LOGS/$release.journal" 2>&1
  fi
  end "$nspawn"
}

make_packages() {
  local version
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../Cargo.toml" | head -1)
  old=$("$here/deb.sh" --version "$version-1" | grep -m1 'tallyd_.*\.deb$') || fail "packaging/deb.sh failed"
  cp "$here/../$old" "$work/old.deb"
  new=$("$here/deb.sh" --version "$version-2" | grep -m1 'tallyd_.*\.deb$') || fail "packaging/deb.sh failed"
  cp "$here/../$new" "$work/new.deb"
}

main() {
  local releases=() debs=()
  parts=
  while [ $# -gt 0 ]; do
    case "$1" in
    --release) releases+=("${2:?a release}") && shift 2 ;;
    # Of the tests, for those who write them: only these, in this order.
    --parts) parts=${2:?parts} && shift 2 ;;
    -*) echo "usage: packaging/try.sh [--release NAME]... [OLD.deb NEW.deb]" >&2 && exit 2 ;;
    *) debs+=("$1") && shift ;;
    esac
  done
  [ "$(id -u)" = 0 ] || { echo "try.sh: needs root, for containers" >&2 && exit 77; }
  work=$(mktemp -d)
  trap finish EXIT
  trap 'exit 130' INT TERM
  install_tools
  if [ ${#debs[@]} -eq 2 ]; then
    cp "${debs[0]}" "$work/old.deb" && cp "${debs[1]}" "$work/new.deb" || exit 66
  else
    make_packages
  fi
  cp "${BASH_SOURCE[0]}" "$work/try.sh"
  cp "$here/../README.md" "$work/README.md"
  chmod 755 "$work" && chmod 644 "$work"/*.deb
  make_disk
  [ ${#releases[@]} -gt 0 ] || releases=(bookworm trixie)
  for release in "${releases[@]}"; do try_release; done
  say "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" = 0 ]
}

if [ "${1:-}" = --inside ]; then
  shift
  inside "$@"
else
  main "$@"
fi
