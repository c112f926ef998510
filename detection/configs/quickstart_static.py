"""The quickstart with a static ResNet18."""

_base_ = "quickstart.py"

model = dict(backbone=dict(config="configs/quickstart/resnet18.json"))
