#!/usr/bin/env bash
# For CI on a new machine: Debian packages without which some tests would be skipped. Users need none of them.
set -euo pipefail
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "== no root or no apt-get: tests that need Debian packages may be skipped"
  exit 0
fi
wanted=()
for pair in redis-server:redis-server openssl:openssl tc:iproute2 shellcheck:shellcheck Orthanc:orthanc; do
  command -v "${pair%%:*}" >/dev/null || wanted+=("${pair#*:}")
done
if [ ${#wanted[@]} -gt 0 ]; then
  case " ${wanted[*]} " in *" orthanc "*) wanted+=(orthanc-dicomweb) ;; esac
  echo "== apt-get install ${wanted[*]}"
  # No package may start its service here: tests start servers of their own. Whoever has such a policy keeps it.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
  fi
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${wanted[@]}"; } \
    >/dev/null 2>&1 || echo "== not installed: the tests that need them are skipped"
fi
