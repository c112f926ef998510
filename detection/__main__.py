"""Run a tool of mmdetection, or any script, with this package imported first.

    python -m kernelwarehouse.detection tools/train.py CONFIG
    torchrun --nproc_per_node 8 -m kernelwarehouse.detection tools/test.py CONFIG CHECKPOINT --launcher pytorch

Paths that are not there are looked up among the tools that mmdetection installs.
"""

import runpy
import sys
from pathlib import Path

import mmdet

if len(sys.argv) < 2:
    sys.exit(__doc__)
script = Path(sys.argv[1])
if not script.is_file():
    script = Path(mmdet.__file__).parent / ".mim" / script
if not script.is_file():
    sys.exit(f"error: {sys.argv[1]}: no such script, and mmdetection installs no such tool")
sys.argv = [str(script), *sys.argv[2:]]
runpy.run_path(str(script), run_name="__main__")
