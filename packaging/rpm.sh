#!/usr/bin/env bash
# Makes tallyd-VERSION-1.ARCH.rpm and tallyd-debuginfo-VERSION-1.ARCH.rpm in target/generate-rpm, checks what they hold,
# and prints their names. Libraries are those of the system that it is built on; on Debian 12 that is glibc 2.36 and
# OpenSSL 3.
#
# cargo-generate-rpm makes it from [package.metadata.generate-rpm] in Cargo.toml, of the same files as the .deb.
set -euo pipefail
cd "$(dirname "$0")/.."

packaging/assets.sh
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
out=target/generate-rpm
rm -rf "$out"
mkdir -p "$out"
licence=$(packaging/deb/copyright.py --spdx "${FEATURES-kafka}")
cargo generate-rpm --target-dir target --output "$out/" --set-metadata "license = \"$licence\""
# Debuggers find it by its build id.
id=$(readelf --notes target/package/tallyd | sed -n 's/.*Build ID: //p')
cargo generate-rpm --target-dir target --output "$out/" --variant debuginfo --set-metadata \
  "assets = [{ source = \"target/package/tallyd.debug\", dest = \"/usr/lib/debug/.build-id/${id:0:2}/${id:2}.debug\", mode = \"644\" }]"
rpm=("$out"/tallyd-[0-9]*.rpm)
symbols=("$out"/tallyd-debuginfo-*.rpm)

wrong() {
  echo "rpm.sh: $*" >&2
  exit 65
}
rpm --checksig --nosignature "${rpm[0]}" "${symbols[0]}" >/dev/null || wrong "a digest does not match"
files=$(rpm -qp --nosignature --qf '[%{FILENAMES} %{FILEMODES:octal} %{FILEUSERNAME} %{FILEFLAGS:fflags}\n]' "${rpm[0]}")
has() { grep -qxE "$1" <<<"$files" || wrong "no file like $1 in"$'\n'"$files"; }
# c: configuration, n: never replaced where somebody edited it, d: a document.
has '/usr/bin/tallyd 100755 root '
has '/usr/libexec/tallyd/hand-over 100755 root '
has '/etc/tallyd/tallyd.toml 100644 root (cn|nc)'
has '/etc/default/tallyd 100644 root (cn|nc)'
has '/usr/lib/systemd/system/tallyd.service 100644 root '
has '/usr/lib/sysusers.d/tallyd.conf 100644 root '
has '/usr/share/man/man1/tallyd.1.gz 100644 root d'
has '/usr/share/man/man5/tallyd.toml.5.gz 100644 root d'
has '/usr/share/licenses/tallyd/copyright 100644 root .*'
scripts=$(rpm -qp --nosignature --scripts "${rpm[0]}")
for part in postinstall preuninstall postuninstall systemd-sysusers /usr/libexec/tallyd/hand-over 'disable --now'; do
  grep -qF -- "$part" <<<"$scripts" || wrong "no $part among the scripts:"$'\n'"$scripts"
done
needs=$(rpm -qp --nosignature --requires "${rpm[0]}")
for part in 'libssl.so.3' 'libc.so.6' systemd; do
  grep -qF -- "$part" <<<"$needs" || wrong "no $part among the requirements:"$'\n'"$needs"
done
sections=$(readelf --sections --wide target/package/tallyd)
if grep -qF .debug_info <<<"$sections"; then wrong "the executable has its symbols"; fi
files=$(rpm -qp --nosignature --qf '[%{FILENAMES} %{FILEMODES:octal} %{FILEUSERNAME} %{FILEFLAGS:fflags}\n]' "${symbols[0]}")
has '/usr/lib/debug/.build-id/.*\.debug 100644 root '
if command -v rpmlint >/dev/null 2>&1; then
  rpmlint --strict --config packaging/rpm/rpmlint.toml "${rpm[0]}" >&2
else
  echo "skipped: rpmlint is not installed" >&2
fi
printf '%s\n' "${rpm[0]}" "${symbols[0]}"
