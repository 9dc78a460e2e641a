#!/usr/bin/env bash
# tallyd beside Etsy's statsd from the npm registry, under the same loads, and prints the ratios. Five minutes at most.
#
#   benches/peers.sh
#
# The peer is a copy in a temporary folder, with its UDP server, its own flush every 10 s, and a backend that only adds
# up what it counted. tallyd has one worker, `store.kind = "memory"` and otherwise its defaults. `tallyd bench` sends to
# both: the generator runs on the first core, the server with all its threads on the second. Each asks for its own receive
# buffer: the peer takes the system's default and has no setting for it.
#
#   lossless    the highest paced rate, one line a packet, of which in 10 s the kernel drops no packet and the server
#               counts every line; found by short runs, then lowered by a tenth until a long one loses nothing
#   CPU         user and system time for a million lines at the same pace for 10 s, its next flush included
#   memory      resident, after 100,000 series have come twice and a flush
set -euo pipefail
cd "$(dirname "$0")/.."

statsd=0.9.0
mix='c=60,ms=25,g=10,s=5'
generator=0
server=$(($(nproc) > 1 ? 1 : 0))

cannot() {
  echo "peers.sh: cannot run: $*" >&2
  exit 69
}

packaging/setup.sh peers || cannot 'node and npm are missing and could not be installed'
directory=$(mktemp -d)
pid=
stop() {
  [ -z "$pid" ] || { kill -9 "$pid" && wait "$pid"; } 2>/dev/null || true
  pid=
}
trap 'stop; rm -rf "$directory"' EXIT
npm install --prefix "$directory" --omit=optional --ignore-scripts --no-audit --no-fund --silent "statsd@$statsd" ||
  cannot "npm could not install statsd@$statsd"
cargo build --quiet --locked --release
tallyd=${CARGO_TARGET_DIR:-target}/release/tallyd

# Waits up to 20 s for a command to succeed.
await() {
  local deadline=$((SECONDS + 20))
  until "$@"; do
    [ $SECONDS -lt $deadline ] || cannot "waited 20 s for: $*"
    sleep 0.1
  done
}

# start NAME: ends the server that runs, and starts this one, which has counted nothing.
start() {
  stop
  all=0
  "start_$1"
}

start_tallyd() {
  local log=$directory/tallyd.log
  taskset -c "$server" "$tallyd" --set listen.udp=127.0.0.1:0 --set listen.tcp=127.0.0.1:0 --set http.ingest=127.0.0.1:0 \
    --set http.api=127.0.0.1:0 --set listen.workers=1 --set store.kind=memory --set limits.new_series=1000000 2>"$log" &
  pid=$!
  await grep -qs '^ready' "$log"
  port=$(sed -n 's/^ready.* udp=127.0.0.1:\([0-9]*\).*/\1/p' "$log")
  api=$(sed -n 's/^ready.* api=127.0.0.1:\([0-9]*\).*/\1/p' "$log")
}

# Lines that it accepted.
counted_tallyd() {
  exec 3<>"/dev/tcp/127.0.0.1/$api"
  printf 'GET /metrics HTTP/1.0\r\nHost: 127.0.0.1:%s\r\n\r\n' "$api" >&3
  awk '/^tallyd_lines_accepted_total\{listener="udp"\}/ { print $2 }' <&3
  exec 3>&-
}

start_statsd() {
  port=$(node -e 'const socket = require("dgram").createSocket("udp4");
    socket.bind(0, () => { console.log(socket.address().port); socket.close() })')
  api=$(node -e 'const server = require("net").createServer();
    server.listen(0, () => { console.log(server.address().port); server.close() })')
  cat >"$directory/adds.js" <<'JS'
// Adds up what was counted, and writes it down after each flush.
let lines = 0;
exports.init = (started, config, events) => {
  events.on('flush', (time, metrics) => {
    lines += metrics.counters['statsd.metrics_received'] - metrics.counters['statsd.bad_lines_seen'];
    require('fs').writeFileSync(config.counted, `${lines}\n`);
  });
  return true;
};
JS
  echo 0 >"$directory/counted"
  cat >"$directory/config.js" <<JS
{ port: $port, address: "127.0.0.1", mgmt_port: $api, mgmt_address: "127.0.0.1", flushInterval: 10000,
  backends: ["$directory/adds.js"], counted: "$directory/counted" }
JS
  taskset -c "$server" node "$directory/node_modules/statsd/stats.js" "$directory/config.js" >/dev/null 2>&1 &
  pid=$!
  await listens
}

counted_statsd() { cat "$directory/counted"; }

listens() { [ -n "$(udp)" ]; }

# Bytes that wait in the server's socket, as the kernel charges them in hexadecimal, and packets that were dropped.
udp() {
  awk -v port="$(printf ':%04X' "$port")" '$2 ~ port "$" { split($5, queue, ":"); print queue[2], $NF }' /proc/net/udp
}
is_read() { [[ $(udp) == 00000000\ * ]]; }
drops() { udp | cut -d' ' -f2; }
cpu_seconds() { sed 's/.*) //' "/proc/$pid/stat" | awk '{ print ($12 + $13) / 100 }'; }
calc() { awk "BEGIN { printf \"%.6g\", ($*) }"; }

# send RATE SECONDS SERIES BYTES: sends, waits until all is read, and sets `sent`, `reached`, the lines a second, and `all`
# that were sent to this server.
send() {
  local report
  report=$(taskset -c "$generator" "$tallyd" bench --to "udp://127.0.0.1:$port" --rate "$1" --time "$2s" --series "$3" \
    --packet "$4" --senders 1 --mix "$mix")
  sent=$(awk '$1 == "sent" { print $2 }' <<<"$report")
  reached=$(awk '$1 == "took" { print $4 }' <<<"$report")
  all=$((all + sent))
  await is_read
}

# lossless RATE SECONDS: whether the pace was kept and nothing dropped.
lossless() {
  local before
  before=$(drops)
  send "$1" "$2" 1000 1
  [ "$(drops)" = "$before" ] && [ "$(calc "$reached >= 0.98 * $1")" = 1 ]
}

# highest NAME RATE: from a rate that a server should take, the highest at which all lines of 10 s are counted; 0 if none.
highest() {
  local rate=$2
  while [ "$rate" -gt 1000 ] && ! lossless "$rate" 2; do rate=$((rate / 2)); done
  while [ "$rate" -lt 4000000 ] && lossless $((rate * 3 / 2)) 2; do rate=$((rate * 3 / 2)); done
  rate=$((rate * 5 / 4))
  for _ in 1 2 3 4 5; do
    if lossless "$rate" 10; then
      settled "$1"
      # A dropped packet is a dropped line.
      [ $(($(counted_"$1") + $(drops))) -eq "$all" ] && highest=$reached || highest=0
      return
    fi
    rate=$((rate * 9 / 10))
  done
  highest=0
}

# settled NAME: waits until what came is counted: a second for tallyd, the next flush for its peer.
settled() {
  if [ "$1" = tallyd ]; then
    sleep 1.5
  else
    touch "$directory/now"
    await test "$directory/counted" -nt "$directory/now"
  fi
}

# cpu NAME RATE BYTES: CPU seconds for a million lines at this pace.
cpu() {
  local before
  send "$2" 1 1000 "$3"
  settled "$1"
  before=$(cpu_seconds)
  send "$2" 10 1000 "$3"
  settled "$1"
  calc "($(cpu_seconds) - $before) * 1e6 / $sent"
}

measure() {
  start "$1"
  cpu_full=$(cpu "$1" 50000 1432)
  cpu_one=$(cpu "$1" 10000 1)
  start "$1"
  highest "$1" "$2"
  start "$1"
  send 20000 10 100000 1432
  settled "$1"
  memory=$(awk '/^VmRSS/ { print $2 / 1024 }' "/proc/$pid/status")
  stop
}

# row NAME TALLYD PEER BETTER WORSE: the last two are the figures again, as numerator and denominator of the ratio.
row() {
  local ratio=-
  [ "$5" = 0 ] || ratio=$(calc "int(100 * $4 / $5 + 0.5) / 100")
  printf '%-52s | %12s | %12s | %6s\n' "$1" "$2" "$3" "$ratio"
}

printf '# %s | node %s, statsd %s | %s\n' "$("$tallyd" --version)" "$(node --version)" "$statsd" "$(uname -sr)"
printf '# %s, %s cores: generator on %s, servers on %s | receive buffer: statsd %s bytes, tallyd asks for 8 MiB\n' \
  "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)" "$(nproc)" "$generator" "$server" \
  "$(cat /proc/sys/net/core/rmem_default)"
measure statsd 10000
peer=("$highest" "$cpu_full" "$cpu_one" "$memory")
measure tallyd 100000
printf '%-52s | %12s | %12s | %6s\n' name tallyd statsd ratio
row 'lossless, one line a packet, 1000 series, lines/s' "$highest" "${peer[0]}" "$highest" "${peer[0]}"
row 'CPU, full packets, 50000 lines/s, s/M lines' "$cpu_full" "${peer[1]}" "${peer[1]}" "$cpu_full"
row 'CPU, one line a packet, 10000 lines/s, s/M lines' "$cpu_one" "${peer[2]}" "${peer[2]}" "$cpu_one"
row 'memory, 100000 series, MiB' "$memory" "${peer[3]}" "${peer[3]}" "$memory"
echo '# ratio: how many times better tallyd is; lossless 0: no run of 10 s was, as where other programs take the cores'
