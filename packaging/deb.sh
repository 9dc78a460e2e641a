#!/usr/bin/env bash
# Makes tallyd_VERSION_ARCH.deb and tallyd-dbgsym_VERSION_ARCH.deb in target/deb, looks them over with lintian, and
# prints their names: `deb.sh [--version VERSION]`. Built on Debian 12 they install on 12 and later.
#
# cargo-deb makes it from [package.metadata.deb] in Cargo.toml; the scripts of the package are in packaging/deb.
# OpenSSL is linked dynamically, so that a fix of it needs no new tallyd. Debian 13 calls its package libssl3t64, which
# provides libssl3 on 64-bit machines; the dependency names both.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: packaging/deb.sh [--version VERSION]"
crate=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
version="$crate-1"
case "${1:-}" in
"") ;;
--version) version=${2:?$usage} ;;
*) echo "$usage" >&2 && exit 2 ;;
esac

packaging/assets.sh
maintainer=$(sed -n '/^\[package.metadata.deb\]/,/^\[/s/^maintainer = "\(.*\)"/\1/p' Cargo.toml)
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
packaging/deb/changelog.py "$version" "$maintainer" "$epoch" >target/package/changelog
export SOURCE_DATE_EPOCH=$epoch

architecture=$(dpkg --print-architecture)
# Not target/debian, which cargo-deb empties of what it made before.
out=target/deb
deb=$out/tallyd_${version}_$architecture.deb
symbols=$out/tallyd-dbgsym_${version}_$architecture.deb
mkdir -p "$out"
rm -f "$deb" "$symbols"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# What cargo-deb lacks: checksums; the name that Debian 13 has for OpenSSL; and for the symbols the section by which Debian
# knows such a package, whose documents are those of the other.
finish() {
  local files=$work/$3
  dpkg-deb --raw-extract "$1" "$files"
  sed -i 's/libssl3 \(([^)]*)\)/libssl3 \1 | libssl3t64 \1/' "$files/DEBIAN/control"
  if [ "$3" = symbols ]; then
    sed -i -e 's/^Priority: .*/Priority: optional/' -e 's/^Section: .*/Section: debug/' \
      -e "s/^Recommends: tallyd/Depends: tallyd/" "$files/DEBIAN/control"
    mkdir -p "$files/usr/share/doc"
    ln -s tallyd "$files/usr/share/doc/tallyd-dbgsym"
  fi
  (cd "$files" && find usr -type f -print0 | sort -z | xargs -0 md5sum >DEBIAN/md5sums && chmod 644 DEBIAN/md5sums)
  dpkg-deb --root-owner-group -Zxz -z4 --build "$files" "$2" >/dev/null
}
cargo deb --quiet --fast --no-build --locked --dbgsym --deb-version "$version" --output "$work/tallyd.deb" >/dev/null
finish "$work/tallyd.deb" "$deb" package
finish "$work/tallyd.ddeb" "$symbols" symbols

# As root lintian warns about itself; what it says of the packages decides.
lintian --allow-root --fail-on error,warning --pedantic -EI "$deb" "$symbols" >&2
printf '%s\n' "$deb" "$symbols"
