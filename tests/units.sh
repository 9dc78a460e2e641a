#!/usr/bin/env bash
# The units of packaging/systemd as systemd reads them: without a complaint, and with a sandbox that it rates 1.5 at most.
# Ends well where there is no systemd-analyze, and says so. What a booted system makes of them packaging/try.sh tries.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v systemd-analyze >/dev/null; then
  echo "units.sh: skipped: no systemd-analyze; Debian has it in the package systemd"
  exit 0
fi
units=$(mktemp -d)
trap 'rm -rf "$units"' EXIT
cp packaging/systemd/* "$units"
# It looks for the executable, which need not be installed here.
sed -i "s|/usr/bin/tallyd|$(command -v true)|" "$units/tallyd.service"
said=$(systemd-analyze verify --man=no "$units"/* 2>&1) || true
if [ -n "$said" ]; then
  echo "$said"
  exit 1
fi
figure=$(systemd-analyze security --offline=true --no-pager "$units/tallyd.service" |
  sed -n 's/.*Overall exposure level for [^:]*: \([0-9.]*\).*/\1/p')
echo "units.sh: $(ls packaging/systemd | wc -l) units are well-formed; exposure level $figure, 1.5 at most"
# Later lines take from earlier ones, so the last word on chown(2) has to be that it is allowed.
grep '^SystemCallFilter=' packaging/systemd/tallyd.service | tail -n 1 | grep -qx 'SystemCallFilter=@chown' ||
  { echo "units.sh: listen.unix_group needs SystemCallFilter=@chown as the last of its kind"; exit 1; }
awk -v figure="${figure:-10}" 'BEGIN { exit !(figure <= 1.5) }'
