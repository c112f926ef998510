"""Upstream's recipe: AdamW for 12 epochs with steps after 8 and 11, for 8 GPUs with 2 images each."""

_base_ = ["mmdet::_base_/schedules/schedule_1x.py", "mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["kernelwarehouse.detection"])
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # Layers share cells, which mmengine would add for each of them.
    paramwise_cfg=dict(norm_decay_mult=0.0, bypass_duplicate=True),
)
