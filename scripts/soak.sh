#!/usr/bin/env bash
# Kills random ranks of short runs and checks that every run ends with the weights of an uninterrupted one.
# scripts/soak.sh --kills N [--seed S] [--ranks R] [--minutes M]; see scripts/soak.py. Exit code 0: all alike.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${HVD_IMAGING_VENV:-$here/.venv}
[ -x "$venv/bin/python" ] || { echo "no environment in $venv; run scripts/setup_env.sh first" >&2; exit 6; }
export PATH="$venv/bin:$PATH"
# shellcheck source=scripts/mpi_env.sh
. "$here/scripts/mpi_env.sh"
exec "$venv/bin/python" "$here/scripts/soak.py" "$@"
