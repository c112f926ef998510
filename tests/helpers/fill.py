"""The deterministic weights behind golden_logits.json.

Every tensor of an upstream-format state dict is filled from its own name and shape, so that no
weights need to be stored. golden_logits.json then holds, per configuration, the first eight logits
that upstream's model gives in float64 and eval mode for `images()`: at temperature 0 ("eval"), 0.5
and 1.0. A loader of upstream checkpoints must reproduce them (relative error below 1e-6 in float64).
"""

import zlib

import numpy as np


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of the tensor named `key` (upstream's name), float32 (int64 for counters)."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    shape = tuple(shape)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        return (0.5 + rng.random(shape)).astype(np.float32)
    noise = rng.standard_normal(shape)
    if key.endswith("running_mean"):
        return (0.1 * noise).astype(np.float32)
    if len(shape) <= 1:
        return ((1.0 if key.endswith(".weight") else 0.0) + 0.1 * noise).astype(np.float32)
    if "warehouse_manager.weights" in key:
        gain = 3 if shape[0] in (12, 16, 28, 44, 4, 36, 8, 80, 112) and shape[2] > 16 else 1
        variance = shape[0] / (shape[2] * (2 if shape[2] < 16 else 9)) * gain
        return (noise * np.sqrt(variance)).astype(np.float32)
    return (noise * np.sqrt(2.0 / int(np.prod(shape[1:])))).astype(np.float32)


def images() -> np.ndarray:
    """The input batch, (2, 3, 224, 224) float32."""
    return np.random.default_rng(2026).standard_normal((2, 3, 224, 224)).astype(np.float32)
