#!/usr/bin/env bash
# Debian packages that the tests use: a SLURM of two nodes, hosts as network namespaces with ssh, a browser for the report.
# Does nothing without apt-get or without root; the tests that need a package then say that they were skipped.
set -euo pipefail
PACKAGES=(slurm-wlm munge openssh-server openssh-client iproute2 procps chromium)
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    exit 0
fi
missing=()
for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "installing Debian packages for the tests: ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
