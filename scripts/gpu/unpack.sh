# Sourced on a GPU machine without a package registry, from anywhere in the checkout: makes this package, and the wheels
# that scripts/pack_device.sh has put into carry/, known to Python, in this shell and what it starts. Nothing that is
# installed is changed.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$_root/.editable"
ln -sfn .. "$_root/.editable/kernelwarehouse"
export PYTHONPATH="$_root/.editable${PYTHONPATH:+:$PYTHONPATH}"
if [ -d "$_root/carry/wheels" ]; then
    # A wheel is a folder of Python files, packed; pip is not needed to unpack one.
    python3 - "$_root/carry" <<'PYTHON' && export PYTHONPATH="$PYTHONPATH:$_root/carry/site"
import sys
import zipfile
from pathlib import Path

carry = Path(sys.argv[1])
for wheel in sorted((carry / "wheels").glob("*.whl")):
    zipfile.ZipFile(wheel).extractall(carry / "site")
PYTHON
fi
unset _root
