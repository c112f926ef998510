"""Mask R-CNN and its kin in mmdetection, on any converted backbone.

Importing the package readies mmdetection: it supplies the operators that mmcv-lite lacks, registers
`DynamicBackbone`, `SimpleFeaturePyramid` and `LayerDecayConstructor`, which configurations then name, and lets data
sets in COCO's format compare the names of their classes with the annotation file. It must come before anything that
imports `mmcv.ops`, as mmdet's own tools do: ``python -m kernelwarehouse.detection tools/train.py CONFIG`` runs those.
"""

from .bridge import install
from .compat import prepare

prepare()
install()

# mmdet may only be imported once it is prepared.
from . import labels  # noqa: E402
from .backbone import DynamicBackbone, KWBackbone  # noqa: E402
from .optim import LayerDecayConstructor  # noqa: E402
from .pyramid import SimpleFeaturePyramid  # noqa: E402

labels.install()

__all__ = ["DynamicBackbone", "KWBackbone", "LayerDecayConstructor", "SimpleFeaturePyramid"]
