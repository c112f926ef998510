#!/usr/bin/env bash
# Installs the package with its test extra into .venv, then checks style and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh test

export OMP_NUM_THREADS=1 # the test processes share the cores already
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/basedpyright --pythonpath .venv/bin/python
.venv/bin/python -m pytest -n auto --maxprocesses 8 "$@"
