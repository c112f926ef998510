"""mmdetection on mmcv-lite: a stand-in, on torchvision and PyTorch, for mmcv's compiled operators.

mmcv-lite holds all of mmcv but the compiled module `mmcv._ext`. `install` supplies that module where no other finder
of Python has it; so a compiled mmcv, when there is one, is what runs. It must be called before `mmcv.ops` is imported.
"""

from .finder import install
from .missing import MissingOperatorError
from .operators import OPERATORS

__all__ = ["OPERATORS", "MissingOperatorError", "install"]
