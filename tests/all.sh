#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lints, docs, tests against real servers, benches compiled,
# and each fuzz target for 20 seconds. Installs what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$*"; "$@"; }

packaging/setup.sh tests
step cargo fmt --check
step cargo fmt --check --manifest-path fuzz/Cargo.toml
# A build without Kafka has to be one as well. All that follows has it, so that nothing is compiled twice.
step cargo clippy --quiet --locked -- -D warnings
step cargo clippy --quiet --locked --features kafka --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --quiet --locked --features kafka --no-deps
step cargo test --locked --features kafka --no-fail-fast
# To see that they build; they measure with the profile `bench`, which takes longer to.
step cargo bench --quiet --locked --features kafka --no-run --profile dev
step tests/units.sh
step tests/statsd_exporter.sh
step fuzz/run.sh 20
echo
echo "skipped: packaging/try.sh, which tries the packages in booted Debian systems: it needs two builds' packages of a release,"
echo "root and some ten minutes. tests/it/systemd.rs and tests/it/handover.rs drive the same executable from outside."
