"""KernelWarehouse: dynamic convolutions for any PyTorch backbone (https://arxiv.org/abs/2406.07879).

Importing the package registers the ``kw_*`` models with timm.
"""
