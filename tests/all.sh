#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lints, docs, tests against real servers, benches and fuzz
# targets compiled. Installs what it needs.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$*"; "$@"; }

packaging/setup.sh tests
step cargo fmt --check
step cargo clippy --quiet --locked --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --quiet --locked --no-deps
step cargo test --locked --no-fail-fast
step cargo bench --quiet --locked --no-run
# libFuzzer's instrumentation needs a flag that stable Rust hides.
step env RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=target/fuzz cargo build --quiet --locked --manifest-path fuzz/Cargo.toml
