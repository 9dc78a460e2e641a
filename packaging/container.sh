#!/usr/bin/env bash
# Builds the image of packaging/Containerfile and runs it as a stranger would: a user without rights, no capabilities, a
# root file system that is read-only, a volume for the state. Sends a line, reads it back, stops it, starts another
# container on the same volume and reads the figure again.
#
# `container.sh` takes the executable that packaging/assets.sh builds; `container.sh --compile` compiles inside, as a plain
# `podman build` does. Where no registry is reachable, the images that FROM names are made by debootstrap, under the same
# names, in a storage that is removed afterwards. Says why, and ends well, where it can't run.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
  echo "skipped: $*"
  exit 0
}
[ "$(id -u)" -eq 0 ] || skip "a container of its own storage is run by root here; the process in it is not root"
for program in podman debootstrap curl nsenter jq; do
  command -v "$program" >/dev/null 2>&1 || skip "no $program: packaging/setup.sh container"
done

work=$(mktemp -d /var/tmp/tallyd-container.XXXXXX)
# vfs copies whole layers and needs nothing of the kernel.
podman=(podman --root "$work/storage" --runroot "$work/run" --storage-driver vfs --cgroup-manager cgroupfs --log-level error)
clean() {
  "${podman[@]}" rm --all --force --time 5 >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean EXIT

debian=docker.io/library/debian:bookworm-slim
rust=docker.io/library/rust:1-slim-bookworm
if ! timeout 60 "${podman[@]}" pull --quiet "$debian" >/dev/null 2>&1; then
  echo "no registry is reachable: debootstrap makes $debian"
  debootstrap --variant=minbase bookworm "$work/debian" >"$work/log" 2>&1 || skip "debootstrap: $(tail -1 "$work/log")"
  tar -C "$work/debian" -c . | "${podman[@]}" import --quiet - "$debian" >/dev/null
  if [ "${1:-}" = --compile ]; then
    cp -a "$(rustc --print sysroot)/." "$work/debian/usr/local/"
    tar -C "$work/debian" -c . | "${podman[@]}" import --quiet - "$rust" >/dev/null
  fi
  rm -rf "$work/debian"
fi

# What this machine's kernel and cgroups let containers be run by.
for runtime in crun runc; do
  command -v "$runtime" >/dev/null 2>&1 || continue
  run=("${podman[@]}" --runtime "$runtime" run --network none --ulimit nofile=4096:4096 --ulimit nproc=4096:4096)
  if "${run[@]}" --rm "$debian" true 2>"$work/log"; then break; fi
  run=()
done
[ ${#run[@]} -gt 0 ] || skip "no container can be run here: $(tail -1 "$work/log" 2>/dev/null || echo "neither crun nor runc")"

if [ "${1:-}" = --compile ]; then
  context=.
  arguments=()
else
  packaging/assets.sh
  context=$work/context
  mkdir -p "$context/target/package" "$context/packaging"
  cp target/package/tallyd "$context/target/package/"
  cp LICENSE "$context/"
  cp packaging/tallyd.toml "$context/packaging/"
  # Builders that make every stage, asked for or not, would compile all the same.
  sed '/^FROM .* AS build$/,/^$/d' packaging/Containerfile >"$context/packaging/Containerfile"
  arguments=(--build-arg TALLYD=prebuilt)
fi
"${podman[@]}" --runtime "$runtime" build --isolation chroot --format docker --pull=never --quiet "${arguments[@]}" \
  --file "$context/packaging/Containerfile" --tag tallyd "$context" >/dev/null
"${podman[@]}" inspect --type image --format \
  'image: user {{.Config.User}}, ports {{.Config.ExposedPorts}}, stopped by {{.Config.StopSignal}}, {{.Size}} bytes' tallyd

start() {
  "${run[@]}" --detach --name "$1" --read-only --cap-drop all --security-opt no-new-privileges --volume state:/var/lib/tallyd \
    tallyd >/dev/null
  pid=$("${podman[@]}" inspect --format '{{.State.Pid}}' "$1")
  for _ in $(seq 100); do
    if inside curl -sf http://127.0.0.1:7000/-/ready >/dev/null; then return; fi
    sleep 0.1
  done
  "${podman[@]}" logs "$1" >&2
  echo "not ok: the container is not ready within 10 s" >&2
  exit 1
}
# The container has no network but a loopback of its own.
inside() { nsenter --net --target "$pid" "$@"; }
total() { inside curl -sf "http://127.0.0.1:7000/data/metrics/container.lines" | jq .value; }
check() {
  if [ "$2" != "$3" ]; then
    echo "not ok: $1: $2 and not $3" >&2
    exit 1
  fi
  echo "ok: $1: $2"
}

start first
check "user of the process" "$(stat -c %u "/proc/$pid")" 8125
check "the root file system" "$(sed -n 's#^[^ ]* / [^ ]* \(ro\|rw\),.*#\1#p' "/proc/$pid/mounts")" ro
"${podman[@]}" --runtime "$runtime" exec first /usr/bin/tallyd send 'container.lines:3|c'
for _ in $(seq 50); do
  if [ "$(total)" = 3 ]; then break; fi
  sleep 0.1
done
check "a line that was sent is counted" "$(total)" 3
check "Prometheus reads it on 0.0.0.0:9102" "$(inside curl -sf http://127.0.0.1:9102/metrics | grep '^container_lines ')" \
  "container_lines 3"
"${podman[@]}" --runtime "$runtime" stop --time 30 first >/dev/null
check "exit code after the signal to stop" "$("${podman[@]}" inspect --format '{{.State.ExitCode}}' first)" 0
"${podman[@]}" rm first >/dev/null
start second
check "the figure in another container on the same volume" "$(total)" 3
