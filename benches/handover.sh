#!/usr/bin/env bash
# What three hand-overs (SIGUSR2) lose under load: lines sent, lines counted in the totals, and what the kernel dropped, at
# paces that the agent can read and at one that it cannot. Sends to loopback only, some 15 s for each row.
#
#   cargo build --release --features kafka && benches/handover.sh
set -euo pipefail
cd "$(dirname "$0")/.."

tallyd=${TALLYD:-$PWD/target/release/tallyd}
[ -x "$tallyd" ] || { echo "handover.sh: no $tallyd; build it, or name another by TALLYD" >&2; exit 66; }
work=$(mktemp -d)
agent=

finish() {
  if [ -n "$agent" ]; then kill "$agent" 2>/dev/null || true; fi
  rm -rf "$work"
}
trap finish EXIT

# until_true SECONDS COMMAND...
until_true() {
  local deadline=$(($(date +%s) + $1))
  shift
  until "$@"; do
    [ "$(date +%s)" -lt "$deadline" ] || { echo "handover.sh: waited for: $*" >&2; cat "$work/log" >&2; exit 1; }
    sleep 0.05
  done
}

has() { [ "$(grep -c "$1" "$work/log")" -ge "$2" ]; }

hand_over() {
  kill -USR2 "$agent"
  until_true 30 has 'handed over' "$1"
  agent=$(grep 'handed over' "$work/log" | tail -1 | sed 's/.*successor=\([0-9]*\).*/\1/')
  until_true 30 has '^ready' $((1 + $1))
}

own() { curl -sf "$api/metrics" | awk -v name="$1" 'index($1, name) == 1 { sum += $2 } END { printf "%d", sum }'; }

# row NAME ARGUMENTS OF BENCH...
row() {
  local name=$1 udp api sent packets dropped counted
  shift
  rm -rf "$work/state" "$work/log"
  env -u NOTIFY_SOCKET TALLYD_STATE_DIR="$work/state" "$tallyd" --set listen.udp=127.0.0.1:0 --set listen.tcp= \
    --set http.ingest= --set http.api=127.0.0.1:0 2>"$work/log" &
  agent=$!
  until_true 10 has '^ready' 1
  udp=$(grep '^ready' "$work/log" | grep -o 'udp=[^ ]*' | cut -d= -f2)
  api=http://$(grep '^ready' "$work/log" | grep -o 'api=[^ ]*' | cut -d= -f2)
  # Counters alone: each line adds one, so the totals say how many lines were counted.
  "$tallyd" bench --to "udp://$udp" --json --mix c=1 --time 10s "$@" >"$work/bench.json" &
  local bench=$!
  for number in 1 2 3; do
    sleep 2
    hand_over "$number"
  done
  wait "$bench"
  sent=$(jq .lines "$work/bench.json")
  packets=$(jq .packets "$work/bench.json")
  # Drops are published once a second.
  sleep 2
  dropped=$(own tallyd_kernel_drops_total)
  counted=$(curl -sf "$api/data/metrics?limit=10000" | jq '[.[].value] | add')
  printf '%-28s %12s %12s %12s %12s\n' "$name" "$sent" "$counted" "$packets" "$dropped"
  kill "$agent"
  until_true 30 has 'stopped' 1
  agent=
}

printf '%-28s %12s %12s %12s %12s\n' 'three hand-overs in 10 s' 'lines sent' counted packets dropped
row '100 k lines/s, full packets' --rate 100000
row '100 k lines/s, one a packet' --rate 100000 --packet 1
row '1 M lines/s, full packets' --rate 1000000
row 'as fast as it goes' --rate 0
