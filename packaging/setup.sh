#!/usr/bin/env bash
# Installs what a fresh Debian machine with Rust lacks: `setup.sh` to build tallyd, `setup.sh tests` to test it as well,
# `setup.sh peers` to measure it beside another server (benches/peers.sh), `setup.sh package` to make packages of it,
# `setup.sh container` to try its image.
# Says nothing when nothing is missing. Needs root only then.
set -euo pipefail

# program, or file, that shows whether it is there : package that brings it. librdkafka is built with the feature kafka alone.
build=(cc:build-essential pkg-config:pkg-config /usr/include/openssl/ssl.h:libssl-dev /usr/include/zlib.h:zlib1g-dev)
tests=(redis-server:redis-server prometheus:prometheus promtool:prometheus nc:netcat-openbsd curl:curl python3:python3 jq:jq
  strace:strace openssl:openssl man:man-db mandoc:mandoc zsh:zsh fish:fish node:nodejs npm:npm)
peers=(node:nodejs npm:npm taskset:util-linux)
package=("${build[@]}" git:git python3:python3 objcopy:binutils dpkg-shlibdeps:dpkg-dev lintian:lintian rpm:rpm)
container=("${package[@]}" podman:podman runc:runc debootstrap:debootstrap curl:curl jq:jq)
# Cargo's own: the packagers.
tools=(cargo-deb cargo-generate-rpm)

wanted=("${build[@]}")
case "${1:-}" in
tests) wanted+=("${tests[@]}") ;;
peers) wanted+=("${peers[@]}") ;;
package) wanted+=("${package[@]}") ;;
container) wanted+=("${container[@]}") ;;
esac

missing=()
for pair in "${wanted[@]}"; do
  command -v "${pair%%:*}" >/dev/null 2>&1 || [ -e "${pair%%:*}" ] || missing+=("${pair##*:}")
done

install_tools() {
  local tool
  for tool in "${tools[@]}"; do
    command -v "$tool" >/dev/null 2>&1 || cargo install --quiet --locked "$tool"
  done
}
if [ ${#missing[@]} -eq 0 ]; then
  case "${1:-}" in package | container) install_tools ;; esac
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi
# The packages' own services are not wanted: tests start servers of their own, on free ports.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod 755 "$policy"
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi
log=$(mktemp)
if ! { "${as_root[@]}" apt-get update -qq &&
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  cat "$log" >&2
  echo "setup.sh: apt-get could not install: ${missing[*]}" >&2
  exit 69
fi
rm -f "$log"
case "${1:-}" in package | container) install_tools ;; esac
