#!/usr/bin/env bash
# Fuzzes the targets, one after the other: fuzz/run.sh [SECONDS [TARGET...]], 20 seconds each of all by default.
# It starts from the cases of tests/corpus and from what earlier runs found worth keeping in target/fuzz/corpus. A
# finding ends it with status 1; the input stays in target/fuzz/findings. `fuzz/run.sh 0` only builds.
# Where dependencies of tallyd changed, `cargo fetch --manifest-path fuzz/Cargo.toml` brings fuzz/Cargo.lock up to it.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-20}
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
  targets=(fuzz/src/bin/*.rs)
  targets=("${targets[@]##*/}")
  targets=("${targets[@]%.rs}")
fi

# What `cargo fuzz` asks of the compiler but for its sanitizer: all code that the laws run is safe. The target is named
# so that the flags are not meant for build scripts.
work=target/fuzz
host=$(rustc --print host-tuple)
sancov=-Cllvm-args=-sanitizer-coverage
export RUSTFLAGS="-Cpasses=sancov-module $sancov-level=4 $sancov-inline-8bit-counters $sancov-pc-table $sancov-trace-compares"
cargo build --quiet --locked --release --manifest-path fuzz/Cargo.toml --target-dir "$work" --target "$host"
[ "$seconds" -gt 0 ] || exit 0

mkdir -p "$work/findings"
python3 fuzz/seeds.py "$work/seeds"
status=0
for target in "${targets[@]}"; do
  mkdir -p "$work/corpus/$target" "$work/seeds/$target"
  log="$work/$target.log"
  options=(-max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=4096 -print_final_stats=1)
  if "$work/$host/release/$target" "${options[@]}" -artifact_prefix="$work/findings/$target-" \
    "$work/corpus/$target" "$work/seeds/$target" >"$log" 2>&1; then
    # Without counters the fuzzer is blind, and would find nothing for ever.
    grep -q 'inline 8-bit counters' "$log" || { echo "$target: not instrumented" >&2; status=1; }
    printf '%s: %s\n' "$target" "$(grep -E '^#[0-9]+\s+DONE' "$log")"
  else
    tail -n 60 "$log" >&2
    echo "$target: a finding; the input is in $work/findings" >&2
    status=1
  fi
done
exit $status
