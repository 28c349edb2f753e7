# Sourced by the tools. `use trainer`, `use trainer server`: makes the environments when they are missing, enters the first.
# `wish launch`: makes it when it is missing; where that fails, what needs it is skipped.
#
# An environment holds dependencies only and lies outside the clone, named after its pins: clones with the same pins share
# it, the code comes by PYTHONPATH. It counts when its file `complete` is there, which is written last.
#
#   DISTIL_PYTHON         interpreter to build with; default: python3.11, python3.12 or python3, the first that fits
#   DISTIL_SERVER_PYTHON  interpreter of the SGLang server, for those who have one already; set for whoever starts servers
#   DISTIL_LAUNCH_PYTHON  interpreter with nemo-run, likewise
#   XDG_CACHE_HOME        where environments lie (in megatron_distil/envs), default ~/.cache

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ENVS=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_distil/envs
INSTALL_DEADLINE_S=3600

die() { echo "${0##*/}: $*" >&2; exit 1; }

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {  # prints an interpreter that can make environments
    local candidate known=
    for candidate in ${DISTIL_PYTHON:-python3.11 python3.12 python3}; do
        case $(python_version "$candidate") in 3.11 | 3.12) ;; *) continue ;; esac
        if has_venv "$candidate"; then echo "$candidate"; return; fi
        known=$candidate
    done
    local version packages
    version=$([ -n "$known" ] && python_version "$known" || echo 3.11)
    packages="python$version python$version-venv"
    if [ -z "${DISTIL_PYTHON:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $packages" >&2
        # shellcheck disable=SC2086 - two words
        { apt-get update && apt-get install -y --no-install-recommends $packages; } >/dev/null 2>&1 || true
        if has_venv "python$version"; then echo "python$version"; return; fi
    fi
    die "needs Python 3.11 or 3.12 with its venv module; on Debian 12: apt-get install $packages" \
        "(or set DISTIL_PYTHON to such a python)"
}

env_path() {  # env_path trainer 3.11
    local hash
    hash=$(cat "$REPO/tools/requirements/$1".*txt | sha256sum)
    echo "$ENVS/$1-py$2-${hash:0:12}"
}

find_env() {  # prints a complete environment of that name, if there is one
    local version path
    for version in $([ -n "${DISTIL_PYTHON:-}" ] && python_version "$DISTIL_PYTHON" || echo 3.11 3.12); do
        path=$(env_path "$1" "$version")
        if [ -e "$path/complete" ]; then echo "$path"; return; fi
    done
}

fill_env() {  # fill_env NAME PATH PYTHON
    local pins=$REPO/tools/requirements/$1
    rm -rf "$2"
    "$3" -m venv "$2"
    if grep -q '^torch==' "$pins.txt" && [ ! -e /dev/nvidiactl ] && command -v uv >/dev/null; then
        # the CPU build of torch where no GPU is: a third of the download. Below, the user's own pip settings decide.
        uv pip install --python "$2/bin/python" --torch-backend=cpu torch==2.13.0 || echo "uv failed; pip will do it"
    fi
    "$2/bin/python" -m pip install -r "$pins.txt" -c "$pins.constraints.txt"
    if [ -e "$pins.no-deps.txt" ]; then
        "$2/bin/python" -m pip install --no-deps -r "$pins.no-deps.txt"
    fi
    touch "$2/complete"
}

make_env() {  # make_env NAME: afterwards find_env NAME prints something
    local name=$1 python path
    python=$(find_python)
    path=$(env_path "$name" "$(python_version "$python")")
    mkdir -p "$ENVS"
    exec 9>"$path.lock"
    if ! flock -n 9; then
        echo "waiting for another installation of $path" >&2
        flock -w "$INSTALL_DEADLINE_S" 9 || die "$path.lock is still held after $INSTALL_DEADLINE_S s"
    fi
    if [ ! -e "$path/complete" ]; then
        echo "installing the $name's dependencies, once; log: $path.log" >&2
        # not `if ! (...)`: bash ignores `set -e` in a condition
        (set -e; fill_env "$name" "$path" "$python") >"$path.log" 2>&1 9>&- &
        wait $! || { tail -n 15 "$path.log" >&2; die "installation failed; log: $path.log"; }
    fi
    exec 9>&-
}

wish() {
    if [ -z "${DISTIL_LAUNCH_PYTHON:-}" ] && [ -z "$(find_env "$1")" ]; then
        (make_env "$1") || echo "going on without the $1 environment" >&2
    fi
}

use() {
    local name first groups=()
    set -m  # each installation in a process group of its own, so that Ctrl-C ends pip as well
    trap 'for name in "${groups[@]}"; do kill -- "-$name" 2>/dev/null; done; exit 130' INT TERM
    for name in "$@"; do
        if [ -z "$(find_env "$name")" ]; then
            (make_env "$name") &
            groups+=($!)
        fi
    done
    for name in "${groups[@]}"; do wait "$name" || exit 1; done
    trap - INT TERM
    set +m
    first=$(find_env "$1")
    export VIRTUAL_ENV=$first PATH="$first/bin:$PATH" PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    if [ -z "${DISTIL_SERVER_PYTHON:-}" ] && [ -n "$(find_env server)" ]; then
        DISTIL_SERVER_PYTHON=$(find_env server)/bin/python
        export DISTIL_SERVER_PYTHON
    fi
    if [ -z "${DISTIL_LAUNCH_PYTHON:-}" ] && [ -n "$(find_env launch)" ]; then
        DISTIL_LAUNCH_PYTHON=$(find_env launch)/bin/python
        export DISTIL_LAUNCH_PYTHON
    fi
    unset PYTHONHOME
}
