#!/usr/bin/env bash
# Writes the software bill of materials of a release (CycloneDX, JSON): every package of the lock with its hashes.
#   scripts/sbom.sh [--python 3.11] OUT.json
set -euo pipefail
version=3.11
if [ "${1:-}" = --python ]; then version=$2; shift 2; fi
[ $# = 1 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
out=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check cyclonedx-bom
"$tools/venv/bin/cyclonedx-py" requirements --output-reproducible --of JSON -o "$out" "scripts/locks/python$version.txt"
