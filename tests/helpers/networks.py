"""Small networks that several tests build."""

import timm
import torch
from torch import nn

# The fields of a configuration that trains within seconds.
TINY = {
    "model": "kw_resnet18",
    "sharing_range": "layer_conv",
    "model_kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]},
    "nb_classes": 10,
    "in_chans": 1,
    "input_size": 16,
    "device": "cpu",
    "num_workers": 0,
    "batch_size": 256,
    "epochs": 2,
    "warmup_epochs": 0,
    "temp_epoch": 1,
    "mixup": 0,
    "cutmix": 0,
}


def narrow_resnet(**kwargs):
    torch.manual_seed(0)
    net = timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=5, zero_init_last=False, **kwargs)
    for module in net.modules():  # a network with statistics of its own, so that no branch is silent
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return net.eval()
