# Sourced on a GPU machine without a package registry, from anywhere in the checkout: makes this package, and the wheels
# that scripts/pack_device.sh has put into carry/, known to Python, in this shell and what it starts. Nothing that is
# installed is changed.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$_root/.editable"
ln -sfn .. "$_root/.editable/kernelwarehouse"
python3 - "$_root" <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

root = Path(sys.argv[1])
# What an installation would have left: checkpoints name the version that wrote them.
version = re.search(r'^version = "(.+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)[1]
about = root / ".editable" / f"kernelwarehouse-{version}.dist-info" / "METADATA"
about.parent.mkdir(exist_ok=True)
about.write_text(f"Metadata-Version: 2.1\nName: kernelwarehouse\nVersion: {version}\n")
# A wheel of pure Python is a folder, packed.
for wheel in sorted((root / "carry" / "wheels").glob("*.whl")):
    zipfile.ZipFile(wheel).extractall(root / "carry" / "site")
PYTHON
export PYTHONPATH="$_root/.editable:$_root/carry/site${PYTHONPATH:+:$PYTHONPATH}"
unset _root
