# Sourced by the scripts: what mpirun wants on a workstation.
# shellcheck shell=bash
# More ranks than cores are fine for tests and small machines.
export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
if [ "$(id -u)" = 0 ]; then
  # Containers often have no other user.
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
