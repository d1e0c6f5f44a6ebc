#!/usr/bin/env bash
# Installs the Debian packages given by name or, with -f FILE, listed in FILE, that are missing.
# Not root, or not Debian: says what is missing and leaves the machine alone. With CI set that, or
# a failed installation, is an error; without it the tests that need the package skip and say so.
set -euo pipefail

packages=()
if [[ ${1:-} == -f ]]; then
    mapfile -t packages < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$2")
else
    packages=("$@")
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "not a Debian system: install the equivalents of: ${packages[*]}" >&2
    exit 0
fi

# dpkg-query exits 1 when it does not know a name; such a package is missing like any other.
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null |
    sed -n 's/^installed //p' || true)
missing=()
for package in "${packages[@]}"; do
    grep -qxF -- "$package" <<<"$installed" || missing+=("$package")
done
((${#missing[@]})) || exit 0

fail() {
    echo "$1" >&2
    echo "run as root: apt-get install --no-install-recommends ${missing[*]}" >&2
    [[ -z ${CI:-} ]]
    exit
}

(($(id -u) == 0)) || fail "missing Debian packages: ${missing[*]}"

export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -qq -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@" </dev/null >/dev/null
}
install_missing() {
    apt install -y --no-install-recommends "${missing[@]}"
}

echo "installing Debian packages: ${missing[*]}" >&2
if compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
    # Known lists may be old: only a failed try is worth the time of an update.
    install_missing || { apt update && install_missing; } || fail "apt-get failed"
else
    { apt update && install_missing; } || fail "apt-get failed"
fi
