#!/usr/bin/env bash
# Prepares a fresh Debian or Ubuntu machine: native libraries, virtual environment, Python packages.
#
#   ./install.sh            for using the project          (make quickstart)
#   ./install.sh --test     and for its tests, SLURM included (make test)
#
# What is already there is left alone. Native libraries come through apt where this user may install
# them; otherwise the exact command is printed and nothing is done half.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS=""
[ "${1:-}" = --test ] && EXTRAS="[test]"

say() { printf '\033[1m%s\033[0m\n' "$*"; }

missing_packages() {
    local needed=()
    command -v g++ >/dev/null || needed+=(g++)
    command -v pkg-config >/dev/null || needed+=(pkg-config)
    if ! command -v pkg-config >/dev/null || ! pkg-config --exists opencv4; then
        needed+=(libopencv-dev)
    fi
    [ -e /usr/include/turbojpeg.h ] || pkg-config --exists libturbojpeg 2>/dev/null \
        || needed+=(libturbojpeg0-dev)
    [ -e /usr/include/jpeglib.h ] || pkg-config --exists libjpeg 2>/dev/null || needed+=(libjpeg-dev)
    [ -e /usr/include/xxhash.h ] || pkg-config --exists libxxhash 2>/dev/null \
        || needed+=(libxxhash-dev)
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || needed+=(python3-venv)
    "$PYTHON" -c 'import pathlib, sysconfig
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()' 2>/dev/null \
        || needed+=(python3-dev)
    if [ -n "$EXTRAS" ] && [ "$(id -u)" = 0 ]; then  # the SLURM tests start daemons: root only
        [ -x /usr/sbin/slurmctld ] || needed+=(slurm-wlm)
        [ -x /usr/sbin/slurmdbd ] || needed+=(slurmdbd)
        dpkg -s slurm-wlm-mysql-plugin >/dev/null 2>&1 || needed+=(slurm-wlm-mysql-plugin)
        [ -x /usr/sbin/munged ] || needed+=(munge)
        [ -x /usr/sbin/mariadbd ] || needed+=(mariadb-server)
        command -v ss >/dev/null || needed+=(iproute2)
    fi
    echo "${needed[*]:-}"
}

apt_install() {
    local sudo=() guard=/usr/sbin/policy-rc.d made_guard=""
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    # Daemons that come with the packages must not start by themselves; the tests start their own.
    if [ ! -e "$guard" ]; then
        printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$guard" >/dev/null
        "${sudo[@]}" chmod 755 "$guard"
        made_guard=1
    fi
    local status=0
    { "${sudo[@]}" apt-get update -qq &&
      "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
          --no-install-recommends "$@" >/dev/null; } || status=$?
    [ -z "$made_guard" ] || "${sudo[@]}" rm -f "$guard"
    return "$status"
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$PYTHON" --version) is too old: Python 3.11 or newer is needed;" \
         "name one with PYTHON=/path/to/python3.11 make ..." >&2
    exit 2
}

packages=$(missing_packages)
if [ -n "$packages" ]; then
    say "Native packages needed: $packages"
    if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
        # shellcheck disable=SC2086
        apt_install $packages
    else
        echo "error: this user may not install them. Ask an administrator to run:" >&2
        echo "    sudo apt-get update && sudo apt-get install -y --no-install-recommends $packages" >&2
        echo "then run this again." >&2
        exit 1
    fi
fi

[ -x "$VENV/bin/python" ] || { say "Making $VENV"; "$PYTHON" -m venv "$VENV"; }
say "Installing Python packages into $VENV (a few minutes the first time)"
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" -c constraints.txt pip setuptools wheel
# torch first: DeepSpeed's build looks at the installed one.
"${pip[@]}" -c constraints.txt torch numpy
PYTHONWARNINGS=ignore "${pip[@]}" -c constraints.txt -e ".$EXTRAS"
say "Ready."
