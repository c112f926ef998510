"""Images of many sizes, from whole ones or from crops: the augmentation of upstream's detectors."""

resize = dict(
    type="RandomChoiceResize",
    scales=[(short, 1333) for short in range(480, 801, 32)],
    keep_ratio=True,
)
multi_scale = dict(
    type="RandomChoice",
    transforms=[
        [resize],
        [
            dict(type="RandomChoiceResize", scales=[(short, 1333) for short in (400, 500, 600)], keep_ratio=True),
            dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
            resize,
        ],
    ],
)
