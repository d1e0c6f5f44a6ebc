#!/usr/bin/env bash
# Installs the Debian packages given by name or, with -f FILE, listed in FILE, that are missing.
# NAME/RELEASE: where this release of Debian has none, that of RELEASE; its dependencies have to be here.
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
installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]%/*}" 2>/dev/null |
    sed -n 's/^installed //p' || true)
missing=()
for package in "${packages[@]}"; do
    grep -qxF -- "${package%/*}" <<<"$installed" || missing+=("$package")
done
((${#missing[@]})) || exit 0

fail() {
    echo "$1" >&2
    echo "run as root: $0 ${missing[*]}" >&2
    [[ -z ${CI:-} ]]
    exit
}

(($(id -u) == 0)) || fail "missing Debian packages: ${missing[*]}"

export DEBIAN_FRONTEND=noninteractive
apt() {
    apt-get -qq -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@" </dev/null >/dev/null
}
is_here() { # NAME
    [[ $(LC_ALL=C apt-cache policy "$1") =~ Candidate:\ [^\(] ]]
}
# By package lists of their own: what this machine installs from stays as it is.
install_from_release() { # NAME/RELEASE
    local folder mirror options
    folder=$(mktemp -d)
    mkdir -p "$folder/lists/partial" "$folder/download"
    chmod 755 "$folder"
    chmod 777 "$folder/download" # apt downloads as a user of its own
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 'Component: main')
    echo "deb ${mirror%%$'\n'*} ${1#*/} main" >"$folder/sources.list"
    options=(-o Dir::Etc::SourceList="$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::State::Lists="$folder/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
    apt "${options[@]}" update && (cd "$folder/download" && apt "${options[@]}" download "$1") &&
        apt install -y --no-install-recommends "$folder"/download/*.deb
    local code=$?
    rm -rf "$folder"
    return "$code"
}
install_missing() {
    local package here=() of_release=()
    for package in "${missing[@]}"; do
        if [[ $package != */* ]] || is_here "${package%/*}"; then
            here+=("${package%/*}")
        else
            of_release+=("$package")
        fi
    done
    apt install -y --no-install-recommends "${here[@]}" || return
    for package in "${of_release[@]}"; do install_from_release "$package" || return; done
}

echo "installing Debian packages: ${missing[*]}" >&2
if compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
    # Known lists may be old: only a failed try is worth the time of an update.
    install_missing || { apt update && install_missing; } || fail "apt-get failed"
else
    { apt update && install_missing; } || fail "apt-get failed"
fi
