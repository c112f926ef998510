#!/usr/bin/env bash
# Installs the package with its test extra into .venv, checks style and runs the tests: test.sh [--all] [ARGUMENTS]
#
# The operators' tests run three times: as the machine is, as on a processor with AVX2 and no more, and as without a C++
# compiler. --all adds the tests marked slow, which check once more, at length, what others check already. With ARGUMENTS
# pytest runs once, with them.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh test

export OMP_NUM_THREADS=1 # the test processes share the cores already
unset PYTHONDONTWRITEBYTECODE # dozens of processes import torch; half of that time is compiling what it imports
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/basedpyright --pythonpath .venv/bin/python

chosen="not slow"
if [ "${1:-}" = --all ]; then
    chosen="slow or not slow"
    shift
fi
test() { .venv/bin/python -m pytest -n auto --maxprocesses 8 -m "$@"; }
test "$chosen" "$@"
if [ $# = 0 ]; then
    chosen="($chosen) and not triton"
    KERNELWAREHOUSE_CPU=avx2 test "$chosen" tests/models/ops
    CXX=no-compiler test "$chosen" tests/models/ops
fi
