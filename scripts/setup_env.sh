#!/usr/bin/env bash
# Makes .venv at the project's root and installs the package there: setup_env.sh [EXTRA], such as "test".
# uv does it in seconds where pip takes minutes; where there is no uv, pip brings it into .venv first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

wanted=(-r requirements.txt ${1:+-e ".[$1]"})
if uv --version >/dev/null 2>&1; then
    [ -d .venv ] || uv venv --python ">=3.10" .venv
    uv pip install --python .venv "${wanted[@]}"
    exit
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed" >&2; exit 1; }
[ -d .venv ] || python3 -m venv .venv
if ! { .venv/bin/python -m pip install --quiet uv && .venv/bin/uv pip install --python .venv "${wanted[@]}"; }; then
    echo "uv cannot be had, or cannot install this; trying by pip, which takes minutes" >&2
    .venv/bin/python -m pip install "${wanted[@]}"
fi
