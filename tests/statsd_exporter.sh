#!/usr/bin/env bash
# tallyd beside the real statsd_exporter, which is built from the Go module proxy into target/: statsd_exporter.py sends both the
# same lines under the same mapping files and compares what Prometheus would see. `statsd_exporter.sh SEED` for other random lines.
set -euo pipefail
cd "$(dirname "$0")/.."

version=v0.31.0
needs_go=1.25.4

packaging/setup.sh peers-go
# The toolchain itself is a module too: an older Go fetches the one that is needed, as Go 1.21 and later would by themselves.
go=go
go_version=$(go env GOVERSION)
if [ "$(printf '%s\n' "$needs_go" "${go_version#go}" | sort -V | head -1)" != "$needs_go" ]; then
  toolchain=$(cd / && GOFLAGS=-mod=mod GO111MODULE=on go mod download -json \
    "golang.org/toolchain@v0.0.1-go$needs_go.$(go env GOOS)-$(go env GOARCH)" | sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p')
  [ -d "$toolchain" ] || { echo "statsd_exporter.sh: Go $needs_go could not be fetched by $go_version" >&2; exit 69; }
  # Files of modules are for reading alone.
  chmod +x "$toolchain"/bin/* "$toolchain"/pkg/tool/*/*
  go=$toolchain/bin/go
fi
cargo build --quiet --locked --features kafka
target=${CARGO_TARGET_DIR:-target}
peer=$(mkdir -p "$target/statsd_exporter/$version" && cd "$target/statsd_exporter/$version" && pwd)
if [ ! -x "$peer/statsd_exporter" ]; then
  # From an empty folder: a file go.mod here or above would have a say.
  log=$(mktemp)
  (cd "$peer" && GOBIN=$peer GOFLAGS=-mod=mod GOTOOLCHAIN=local GOWORK=off "$go" install "github.com/prometheus/statsd_exporter@$version") \
    >"$log" 2>&1 || { cat "$log" >&2; echo "statsd_exporter.sh: statsd_exporter $version could not be built" >&2; exit 69; }
  rm -f "$log"
fi
timeout 120 python3 tests/statsd_exporter.py "$target/debug/tallyd" "$peer/statsd_exporter" "$@"
