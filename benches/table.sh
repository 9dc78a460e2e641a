#!/usr/bin/env bash
# Runs every bench with its default arguments, or those whose names are given, and prints one table of all figures:
# name | figure | limit | ratio | goal | met. Above it stands the machine, below it how many goals are met.
#
#   benches/table.sh                 # a quarter of an hour; what else runs on the machine changes the figures
#   benches/table.sh parse seal      # some benches
#   QUICK=1 benches/table.sh         # shorter rounds, for a look
set -euo pipefail
cd "$(dirname "$0")/.."

benches=(parse ingest seal flush scrape memory agent)
[ $# -eq 0 ] || benches=("$@")
arguments=()
[ -z "${QUICK:-}" ] || arguments=(--quick)

about() { printf '# %-8s %s\n' "$1" "$2"; }
about machine "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | sort -u | paste -sd,), $(nproc) cores"
about kernel "$(uname -sr)"
about compiler "$(rustc --version)"
about date "$(date -u '+%Y-%m-%d %H:%M UTC')"
about load "$(cut -d' ' -f1-3 /proc/loadavg)"

cargo bench --quiet --locked --no-run
table=$(mktemp)
trap 'rm -f "$table"' EXIT
failed=()
for bench in "${benches[@]}"; do
  # The first bench's head is that of the table.
  cargo bench --quiet --locked --bench "$bench" -- "${arguments[@]}" |
    { if [ -s "$table" ]; then grep -v '^name ' || true; else cat; fi; } | tee -a "$table" || failed+=("$bench")
done

met=$(grep -c '| yes$' "$table" || true)
missed=$(grep -c '| NO$' "$table" || true)
printf '# %d of %d goals met\n' "$met" $((met + missed))
if [ ${#failed[@]} -gt 0 ]; then
  echo "table.sh: these ended early: ${failed[*]}" >&2
  exit 1
fi
