#!/usr/bin/env bash
# Prepares a fresh Debian or Ubuntu machine: native libraries, virtual environment, Python packages.
#
#   ./install.sh                     for using the project          (make quickstart)
#   ./install.sh --test              and for its tests, SLURM included (make test)
#   ./install.sh --prefix DIR        native packages are unpacked into DIR: needs no root, and serves
#                                    every node that sees DIR
#   ./install.sh --native-only       stop when the native packages are there
#   ./install.sh --download WHEELS   fill WHEELS with all that --offline needs, on a machine of the
#                                    same distribution and Python that has internet
#   ./install.sh --offline WHEELS    install from WHEELS alone
#
# What is already there is left alone. Native libraries come through apt where this user may install
# them; another user's are unpacked into .native beside this file.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRAS="" PREFIX="" WHEELS="" OFFLINE="" NATIVE_ONLY=""

say() { printf '\033[1m%s\033[0m\n' "$*"; }

fail() {
    printf 'error: %s\n' "$@" >&2
    exit "${STATUS:-1}"
}

while [ $# -gt 0 ]; do
    case $1 in
        --test) EXTRAS="[test]" ;;
        --native-only) NATIVE_ONLY=1 ;;
        --prefix | --download | --offline)
            [ $# -gt 1 ] || STATUS=2 fail "$1: name a folder, e.g. $1 \$HOME/resnet-dist-native"
            mkdir -p "$2"
            folder=$(cd "$2" && pwd)
            case $1 in --prefix) PREFIX=$folder ;; --offline) OFFLINE=1 WHEELS=$folder ;;
                       *) WHEELS=$folder ;; esac
            shift ;;
        *) STATUS=2 fail "$1: no such option; the head of install.sh lists them" ;;
    esac
    shift
done

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
    has_python_headers || needed+=(python3-dev)
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

has_python_headers() {
    "$PYTHON" -c 'import pathlib, sysconfig
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()' 2>/dev/null
}

apt_install() (  # a shell of its own, whose end, by Ctrl-C too, takes the guard away
    sudo=() guard=/usr/sbin/policy-rc.d
    [ "$(id -u)" = 0 ] || sudo=(sudo -n)
    # Daemons that come with the packages must not start by themselves; the tests start their own.
    if [ ! -e "$guard" ]; then
        trap '"${sudo[@]}" rm -f "$guard"' EXIT
        printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$guard" >/dev/null
        "${sudo[@]}" chmod 755 "$guard"
    fi
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
        --no-install-recommends "$@" >/dev/null
)

# -- Without root ----------------------------------------------------------------------------------

# What the native parts link, with all it needs in turn; the headers of OpenCV's other modules stay
# away. Every node has the C library and compiler's own, and mixing two of them breaks programs; GL's
# drivers only draw.
LINKED=(libopencv-imgproc-dev libturbojpeg0-dev libjpeg-dev libxxhash-dev pkg-config)
LEFT_OUT='^(libc6|libc-|libcrypt|libgcc|libstdc|gcc-|linux-libc|libllvm|libgl1-mesa|libz3|libicu|perl'
LEFT_OUT+='|libssl|libkrb5|libk5|libgssapi|libkeyutils|libcom-err|libtirpc|libnsl|rpcsvc)'

unpack_packages() {
    local state=$PREFIX/apt python version
    command -v g++ >/dev/null || fail "g++: not found; load a compiler (on many clusters:" \
        "    module load gcc) and run this again"
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    python=()
    has_python_headers || python+=("libpython$version-dev")
    "$PYTHON" -c 'import ensurepip' 2>/dev/null || python+=(python3-pip-whl)
    if [ "$(cat "$PREFIX/complete" 2>/dev/null)" = "${LINKED[*]} ${python[*]:-}" ] \
            && { [ -z "$WHEELS" ] || [ -d "$WHEELS/debs" ]; }; then
        return
    fi
    mkdir -p "$state/debs" "$state/lists/partial" "$state/cache/archives/partial"
    : >"$state/status"  # nothing counts as installed: the other nodes may have less than this one
    if [ -n "$OFFLINE" ]; then
        cp "$WHEELS"/debs/*.deb "$state/debs/" 2>/dev/null || fail \
            "--offline = $WHEELS: holds no debs/*.deb; fill it with ./install.sh --download" \
            "    $WHEELS on a machine of the same distribution"
    else
        download_packages "$state" "${python[@]}"
    fi
    for package in "$state"/debs/*.deb; do dpkg -x "$package" "$PREFIX"; done
    if [ -n "$WHEELS" ] && [ -z "$OFFLINE" ]; then
        mkdir -p "$WHEELS/debs"
        cp "$state"/debs/*.deb "$WHEELS/debs/"
    fi
    settle_prefix
    rm -rf "$state"
    echo "${LINKED[*]} ${python[*]:-}" >"$PREFIX/complete"
}

download_packages() {  # STATE [PYTHON PACKAGE ...]
    command -v apt-get >/dev/null || fail \
        "apt-get: not found, and only Debian's and Ubuntu's packages can be unpacked;" \
        "    elsewhere use the container: docs/install.md"
    local state=$1 apt names
    apt=(-o "Dir::State=$state" -o "Dir::State::status=$state/status" -o "Dir::Cache=$state/cache"
         -o "Dir::State::lists=$state/lists" -o Debug::NoLocking=1 -o APT::Sandbox::User="$(id -un)"
         -o Acquire::Languages=none -qq)
    apt-get "${apt[@]}" update
    names=$(apt-get "${apt[@]}" -s --no-install-recommends install "${LINKED[@]}" \
            | sed -n 's/^Inst \([^ :]*\).*/\1/p' | grep -Ev "$LEFT_OUT")
    # libopencv-dev alone, for its opencv.hpp and its file for pkg-config.
    # shellcheck disable=SC2086
    (cd "$state/debs" && apt-get "${apt[@]}" download $names libopencv-dev "${@:2}" >/dev/null)
}

settle_prefix() {
    local lib include
    lib=$(dirname "$(find "$PREFIX/usr/lib" -name libturbojpeg.so | head -1)")
    include=$PREFIX/usr/include/opencv4/opencv2
    # Packages know only /usr; and of OpenCV's modules, only these two are here.
    find "$PREFIX/usr" -name '*.pc' -exec sed -i "s#=/usr#=$PREFIX/usr#" {} +
    sed -i -E 's/(-L[^ ]+) .*/\1 -lopencv_imgproc -lopencv_core/' "$lib/pkgconfig/opencv4.pc"
    sed -i -E '/define HAVE_OPENCV_/{/_(CORE|IMGPROC)$/!d}' "$include/opencv_modules.hpp"
    # What update-alternatives does when a package is installed.
    for library in blas/libblas.so.3 lapack/liblapack.so.3; do
        [ ! -e "$lib/$library" ] || ln -sf "$library" "$lib/$(basename "$library")"
    done
    write_environment "$lib"
}

# What a build against the prefix needs: sourced below, and by hand for another program.
write_environment() {  # LIB
    local lib=$1 other headers
    other=$PREFIX/lib/$(basename "$lib")  # where packages have what starts a machine
    headers=$(find "$PREFIX/usr/include" -maxdepth 1 -name 'python3.*' -printf ':%p')
    cat >"$PREFIX/environment.sh" <<EOF
export PKG_CONFIG_PATH=$lib/pkgconfig:$PREFIX/usr/share/pkgconfig
export CPATH=$PREFIX/usr/include:$PREFIX/usr/include/$(basename "$lib")$headers
export LIBRARY_PATH=$lib
# RPATH and not RUNPATH: it also holds for the libraries that these libraries need.
export LDFLAGS="-Wl,--disable-new-dtags,-rpath,$lib:$other,-rpath-link,$lib:$other"
if ! command -v pkg-config >/dev/null; then
    export PATH=\$PATH:$PREFIX/usr/bin LD_LIBRARY_PATH=$lib
fi
EOF
}

# -- Python ----------------------------------------------------------------------------------------

make_venv() {
    [ ! -x "$VENV/bin/python" ] || return 0
    say "Making $VENV"
    if "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
        "$PYTHON" -m venv "$VENV"
        return
    fi
    local wheel  # Debian's python3 without python3-venv: pip starts from its own wheel
    wheel=$(find "$PREFIX/usr/share/python-wheels" -name 'pip-*.whl' 2>/dev/null | head -1)
    [ -n "$wheel" ] || fail "ensurepip: $PYTHON lacks it; install python3-venv, or use --prefix DIR"
    "$PYTHON" -m venv --without-pip "$VENV"
    "$VENV/bin/python" "$wheel/pip" install --quiet --disable-pip-version-check "${from[@]}" \
        -c constraints.txt pip
}

fill_wheels() {
    say "Filling $WHEELS"
    "${pip[@]}" -c constraints.txt pip setuptools wheel
    "$VENV/bin/python" -m pip wheel --quiet -w "$WHEELS" -c constraints.txt pip setuptools wheel \
        torch numpy "setuptools>=77" ".$EXTRAS" \
        "opencv-python-headless==$(sed -n 's/^opencv-python==//p' constraints.txt)"
    rm -f "$WHEELS"/resnet_dist-*.whl "$WHEELS"/ffcv-*.whl  # built where they are used
    "$VENV/bin/python" -m pip download --quiet --no-deps --no-binary ffcv -d "$WHEELS" \
        -c constraints.txt ffcv
    say "Ready: copy $WHEELS and this folder, and run ./install.sh --offline WHEELS there."
}

# FFCV asks for opencv-python, which does not load without a display's libraries; its twin does.
without_display() {
    local version
    "$VENV/bin/python" -c 'import cv2' 2>/dev/null && return
    version=$(sed -n 's/^opencv-python==//p' constraints.txt)
    "$VENV/bin/python" -m pip uninstall --quiet --yes opencv-python opencv-python-headless \
        2>/dev/null
    "${pip[@]}" "opencv-python-headless==$version"
}

check_libraries() {
    local lost
    lost=$(find "$VENV"/lib/python3*/site-packages/ffcv resnet_dist data_prep -name '*.so' \
           -exec env -u LD_LIBRARY_PATH ldd {} + | sed -n 's/^[[:space:]]*\(.*\) => not found/\1/p' | sort -u | xargs)
    [ -z "$lost" ] || fail "$lost: built against, but not found when loaded;" \
        "    was ${PREFIX:-a library} moved? Remove $VENV and run this again"
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    STATUS=2 fail "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed;" \
        "    name one with PYTHON=/path/to/python3.11 make ..."
}

from=()
[ -z "$OFFLINE" ] || from=(--no-index --find-links "$WHEELS")
packages=$(missing_packages)
if [ -z "$PREFIX" ] && [ -n "$packages$WHEELS" ]; then
    if [ -z "$OFFLINE" ] && command -v apt-get >/dev/null && [ -n "$packages" ] \
            && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
        say "Native packages needed: $packages"
        # shellcheck disable=SC2086
        apt_install $packages
    else
        mkdir -p .native
        PREFIX=$PWD/.native
    fi
fi
if [ -n "$PREFIX" ]; then
    say "Unpacking native packages into $PREFIX"
    unpack_packages
    # shellcheck disable=SC1091
    . "$PREFIX/environment.sh"
fi
[ -z "$NATIVE_ONLY" ] || exit 0

make_venv
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${from[@]}")
if [ -n "$WHEELS" ] && [ -z "$OFFLINE" ]; then
    fill_wheels
    exit 0
fi
say "Installing Python packages into $VENV (a few minutes the first time)"
"${pip[@]}" -c constraints.txt pip setuptools wheel
# torch first: DeepSpeed's build looks at the installed one.
"${pip[@]}" -c constraints.txt torch numpy
PYTHONWARNINGS=ignore "${pip[@]}" -c constraints.txt -e ".$EXTRAS"
without_display
check_libraries
say "Ready."
