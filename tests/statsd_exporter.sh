#!/usr/bin/env bash
# tallyd beside the real statsd_exporter, which is built from the Go module proxy into target/: statsd_exporter.py sends both the
# same lines under the same mapping files and compares what Prometheus would see. `statsd_exporter.sh SEED` for other random lines.
# Where Go is older than that version needs, it says so and ends well.
set -euo pipefail
cd "$(dirname "$0")/.."

version=v0.31.0
needs_go=1.25

packaging/setup.sh peers-go
go_version=$(go env GOVERSION)
go_version=${go_version#go}
if [ "$(printf '%s\n' "$needs_go" "$go_version" | sort -V | head -1)" != "$needs_go" ]; then
  echo "statsd_exporter.sh: skipped: statsd_exporter $version needs Go $needs_go, and here is $go_version"
  exit 0
fi
cargo build --quiet --locked --features kafka
target=${CARGO_TARGET_DIR:-target}
peer=$(mkdir -p "$target/statsd_exporter/$version" && cd "$target/statsd_exporter/$version" && pwd)
if [ ! -x "$peer/statsd_exporter" ]; then
  # From an empty folder: a file go.mod here or above would have a say.
  log=$(mktemp)
  (cd "$peer" && GOBIN=$peer GOFLAGS=-mod=mod GOTOOLCHAIN=local GOWORK=off go install "github.com/prometheus/statsd_exporter@$version") \
    >"$log" 2>&1 || { cat "$log" >&2; echo "statsd_exporter.sh: statsd_exporter $version could not be built" >&2; exit 69; }
  rm -f "$log"
fi
timeout 120 python3 tests/statsd_exporter.py "$target/debug/tallyd" "$peer/statsd_exporter" "$@"
