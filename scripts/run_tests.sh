#!/usr/bin/env bash
# The one test command: environment, checks of form, then all tests. Arguments go to pytest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"
./scripts/setup_env.sh

venv=${HVD_IMAGING_VENV:-$here/.venv}
export PATH="$venv/bin:$PATH"
# shellcheck source=scripts/mpi_env.sh
. scripts/mpi_env.sh

failed=()
check() {
  printf '== %s\n' "$*"
  "$@" || failed+=("$1")
}
check ruff check .
check mypy
check lint-imports
if command -v shellcheck >/dev/null; then
  check shellcheck -x scripts/*.sh .ci/run
else
  echo "== shellcheck is not installed: scripts are not checked (Debian: apt-get install shellcheck)"
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
echo "== pytest"
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
# Tests of one process share the cores; ranks, clusters and browsers get the machine for themselves.
code=0
python -m pytest -n logical --maxprocesses 4 tests/single || code=$?
python -m pytest tests/parallel tests/integration || code=$?
exit $code
