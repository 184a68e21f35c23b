#!/usr/bin/env bash
# For CI on a new machine: Debian packages without which some tests would be skipped. Users need none of them.
set -euo pipefail
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "== no root or no apt-get: tests that need Debian packages may be skipped"
  exit 0
fi
install() {
  echo "== apt-get install $*"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@"; } \
    >/dev/null 2>&1 || echo "== not installed: the tests that need them are skipped"
}
# Services must not start: the tests start servers of their own. A policy that is there stays.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
fi
PATH=$PATH:/usr/sbin
wanted=()
for pair in redis-server:redis-server openssl:openssl tc:iproute2 shellcheck:shellcheck sbatch:slurm-wlm munged:munge chromium:chromium; do
  command -v "${pair%%:*}" >/dev/null || wanted+=("${pair#*:}")
done
command -v Orthanc >/dev/null || wanted+=(orthanc orthanc-dicomweb)
if [ ${#wanted[@]} -gt 0 ]; then
  install "${wanted[@]}"
fi
