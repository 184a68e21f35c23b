#!/usr/bin/env bash
# Renews scripts/locks: every package of every extra, with the SHA-256 of each of its files, for each Python that setup.cfg names.
# To raise a version, change it in constraints.txt and run this; what constraints.txt does not name stays where it is.
#   scripts/lock.sh             after a change of setup.cfg or constraints.txt
#   scripts/lock.sh --upgrade   to raise also what constraints.txt does not name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
for version in 3.11 3.12; do
  "$tools/venv/bin/uv" pip compile --quiet --python-version "$version" --python-platform linux --generate-hashes --no-header --all-extras \
    --constraints scripts/constraints.txt --output-file "scripts/locks/python$version.txt" "$@" setup.cfg scripts/build-tools.in
done
