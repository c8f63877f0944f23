#!/usr/bin/env bash
# Runs all tests, and the style checks. Sets up the environment first. Needs no GPU, and no network after set-up.
# Tests of the dashboard in a browser run if Chromium is installed (Debian: apt-get install chromium), else they are skipped.
#
#     bash scripts/run_tests.sh                       # everything
#     bash scripts/run_tests.sh -m "not slow" -k ppm  # arguments go to pytest
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    set -- -n 2
fi
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE exec .venv/bin/python -m pytest "$@"
