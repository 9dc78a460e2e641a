#!/usr/bin/env bash
# Installs the clients that tests/it/clients.rs runs, with the versions that stand beside this file, into a folder:
#
#   tests/clients/install.sh python FOLDER   # a virtual environment: FOLDER/python/bin/python
#   tests/clients/install.sh node FOLDER     # FOLDER/node/node_modules
#
# Says nothing when they are there. What it needs of the system, packaging/setup.sh tests brings.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kind=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)/$kind

cannot() {
  echo "install.sh: cannot install the clients for $kind: $*" >&2
  exit 69
}

# The system's own interpreter first: what else is called so may be a stand-in that has none behind it.
python3=/usr/bin/python3
[ -x "$python3" ] || python3=$(command -v python3) || cannot 'there is no python3'

install_python() {
  "$python3" -m venv "$folder" || cannot 'python3 has no venv; Debian has it in python3-venv'
  "$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps --requirement "$1" ||
    cannot 'pip could not install what requirements.txt names; see above'
}

install_node() {
  command -v npm >/dev/null || cannot 'there is no npm'
  mkdir -p "$folder"
  cp "$1" "$folder/package.json"
  # Sockets of datagrams are an addon, built against the headers that are there: others would have to be fetched.
  local nodedir
  nodedir=$(node -p 'path.dirname(path.dirname(process.execPath))')
  (cd "$folder" && npm_config_nodedir=$nodedir npm install --no-audit --no-fund --no-package-lock --loglevel=error >/dev/null) ||
    cannot 'npm could not install what package.json names; see above'
  # npm leaves out silently what could not be built.
  (cd "$folder" && node -e 'require("unix-dgram")') ||
    cannot 'unix-dgram could not be built; it needs a compiler, make, python3 and the headers of node (libnode-dev)'
}

case "$kind" in
python) pins=$here/requirements.txt ;;
node) pins=$here/package.json ;;
*) cannot 'python or node' ;;
esac
# Tests run beside each other.
exec 9>"$folder.lock"
flock 9
cmp --quiet "$pins" "$folder/installed" && exit 0
rm -rf "$folder"
"install_$kind" "$pins"
cp "$pins" "$folder/installed"
