#!/usr/bin/env bash
# Creates the virtual environment .venv with the pinned packages of requirements.txt (about 6 GB, minutes the first time).
# Sourced by demo.sh and run_tests.sh; does nothing if the environment is up to date; resumes after an interruption.
#
#     bash scripts/setup.sh            # then: source .venv/bin/activate
#     PYTHON=python3.12 bash scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.13 python3.11 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "UGround needs Python 3.11 to 3.13; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true)." \
        "Install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

set_up() {
    local stamp=.venv/installed.txt python
    if cmp -s requirements.txt "$stamp"; then
        return
    fi
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "creating .venv with $("$python" --version)"
        "$python" -m venv .venv || fail "$python cannot create virtual environments; on Debian: apt install python3-venv"
    fi
    echo "installing requirements.txt into .venv: about 3 GB to download, once"
    .venv/bin/python -m pip install --progress-bar on -r requirements.txt ||
        fail "the packages could not be installed (messages above). Run the same command again to resume. Required:" \
            "access to PyPI, 7 GB of disk, and, where a package has no wheel for this machine, a C++ compiler" \
            "(${CXX:-g++}: $(command -v "${CXX:-g++}" || echo 'not found; on Debian: apt install g++'))"
    cp requirements.txt "$stamp"
}

set_up
