#!/usr/bin/env bash
# Builds the executable of a release, with Kafka, and beside it in target/package what packages install and is made from
# it or from the sources: manual pages, completions, Debian's changelog and copyright, changelog and manual compressed.
# deb.sh and rpm.sh call it; FEATURES names other features, SOURCE_DATE_EPOCH another day than that of the last commit.
set -euo pipefail
cd "$(dirname "$0")/.."

packaging/setup.sh package
features=${FEATURES-kafka}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
day=$(date --utc --date="@$SOURCE_DATE_EPOCH" +%Y-%m-%d)

cargo build --quiet --release --locked --features "$features"
tallyd=${CARGO_TARGET_DIR:-target}/release/tallyd
out=target/package
rm -rf "$out"
mkdir -p "$out"

# -n: the same bytes from the same sources.
"$tallyd" man tallyd --date "$day" | gzip -9n >"$out/tallyd.1.gz"
"$tallyd" man tallyd.toml --date "$day" | gzip -9n >"$out/tallyd.toml.5.gz"
for shell in bash zsh fish; do "$tallyd" completions "$shell" >"$out/tallyd.$shell"; done
packaging/deb/copyright.py "$features" >"$out/copyright"
gzip -9n <CHANGELOG.md >"$out/changelog.gz"
gzip -9n <README.md >"$out/README.md.gz"

# For the rpm; cargo-deb takes the symbols apart itself.
objcopy --only-keep-debug --compress-debug-sections "$tallyd" "$out/tallyd.debug"
strip --strip-unneeded -o "$out/tallyd" "$tallyd"
objcopy --remove-section=.gnu_debuglink --add-gnu-debuglink="$out/tallyd.debug" "$out/tallyd"

if ! "$tallyd" check --print-defaults | cmp - packaging/tallyd.toml; then
  echo "assets.sh: packaging/tallyd.toml is not what \`tallyd check --print-defaults\` prints" >&2
  exit 65
fi
