"""Scenes for detection: real digits or garments over real photographs, with the exact mask of each object.

All of it ships with the project's dependencies. Objects for training and for evaluation are different images, on
different regions of the photographs, so that held-out scenes are unseen in every part.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets import FashionMNIST

from ..configs.schema import ConfigError
from .digits import Digits

# With less of it in sight, a digit can be hard to name even for a person.
MIN_VISIBLE = 0.6
# The longest side of an object's image, relative to the scene's, before it is turned.
SCALES = (0.2, 0.5)
MAX_ANGLE = 25.0  # degrees; further, a 6 could be a 9
# Least distance between the brightness of an object and of what it covers, of 255.
MIN_CONTRAST = 70.0
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Cutouts:
    """Grey images of single objects on black.

    Attributes:
        images: (N, h, w) in [0, 1].
        targets: The class of each, (N,) integers.
        classes: Names of the classes.
        edge: The grey value at which an object begins.
    """

    images: np.ndarray
    targets: np.ndarray
    classes: tuple[str, ...]
    edge: float


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows.

    Attributes:
        image: (size, size, 3) bytes.
        masks: The visible part of each object, (N, size, size) booleans; no pixel belongs to two.
        targets: The class of each object, N integers.
        visible: The share of each object that is visible, neither occluded nor outside the picture, (N,).
    """

    image: np.ndarray
    masks: np.ndarray
    targets: tuple[int, ...]
    visible: np.ndarray


def load_digits(train: bool) -> Cutouts:
    """Return one part of the embedded digits."""
    digits = Digits(train)
    return Cutouts(digits.images[:, 0].numpy(), np.array(digits.targets), digits.classes, edge=0.4)


def load_fashion(train: bool, root: Path) -> Cutouts:
    """Return one part of Fashion-MNIST.

    Args:
        train: The training part, else the held-out part.
        root: The folder in which torchvision keeps it.

    Raises:
        ConfigError: Its files are not there.
    """
    try:
        fashion = FashionMNIST(str(root), train=train, download=False)
    except RuntimeError as e:
        raise ConfigError(
            f"{root} does not hold the files of Fashion-MNIST as torchvision keeps them; "
            f"torchvision.datasets.FashionMNIST({str(root)!r}, download=True) fetches them"
        ) from e
    return Cutouts(fashion.data.numpy() / 255, fashion.targets.numpy(), tuple(fashion.classes), edge=0.15)


def load_backgrounds(train: bool) -> list[Image.Image]:
    """Return the left halves of scikit-learn's two photographs for training, the right halves for evaluation."""
    photographs = load_sample_images().images
    halves = [np.split(pixels, [pixels.shape[1] // 2], axis=1) for pixels in photographs]
    return [Image.fromarray(left if train else right) for left, right in halves]


def draw_scene(
    generator: np.random.Generator, cutouts: Cutouts, backgrounds: list[Image.Image], size: int, max_objects: int
) -> Scene:
    """Draw a scene of 1 to `max_objects` objects, each over those before it.

    A place where an object, or another one below it, would be visible by less than `MIN_VISIBLE` is not taken; so a
    crowded scene may hold fewer objects than it was to have.

    Args:
        generator: Decides everything.
        cutouts: The objects to choose from.
        backgrounds: The pictures to choose a crop from.
        size: Side of the scene, in pixels.
        max_objects: The most objects.
    """
    canvas = _background(generator, backgrounds, size)
    owner = np.full((size, size), -1)  # the object that each pixel shows
    targets, areas, shown = [], [], np.empty(0)
    wanted = generator.integers(1, max_objects + 1)
    for _ in range(10 * wanted):
        index = generator.integers(len(cutouts.targets))
        grey, coverage, area = _place(generator, cutouts.images[index], cutouts.edge, size)
        after = np.where(coverage >= 0.5, len(areas), owner)
        visible = np.bincount(after[after >= 0], minlength=len(areas) + 1) / np.maximum([*areas, area], 1)
        if visible.min() < MIN_VISIBLE:
            continue
        ink = _ink(generator, canvas[coverage >= 0.5].mean(axis=0))
        shaded = ink * (0.3 + 0.7 * grey[..., None])
        canvas += coverage[..., None] * (shaded - canvas)
        owner, shown = after, visible
        targets.append(int(cutouts.targets[index]))
        areas.append(area)
        if len(areas) == wanted:
            break
    masks = owner == np.arange(len(areas))[:, None, None]
    return Scene(canvas.round().astype(np.uint8), masks, tuple(targets), shown)


def _background(generator: np.random.Generator, pictures: list[Image.Image], size: int) -> np.ndarray:
    """A random square of a picture, mirrored or not, of random contrast; (size, size, 3) floats in [0, 255]."""
    picture = pictures[generator.integers(len(pictures))]
    side = int(generator.uniform(0.5, 1.0) * min(picture.size))
    left, top = (int(generator.integers(length - side + 1)) for length in picture.size)
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(square, dtype=np.float64)[:, :: generator.choice([-1, 1])]
    mean = pixels.mean()
    return np.clip(mean * generator.uniform(0.8, 1.2) + (pixels - mean) * generator.uniform(0.6, 1.2), 0, 255)


def _place(
    generator: np.random.Generator, image: np.ndarray, edge: float, size: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Scale, rotate and shift an object; return its grey values and coverage, both (size, size) in [0, 1], and area.

    A pixel belongs to the object that covers at least half of it. The area counts such pixels in and outside the
    picture.
    """
    margin = 2  # so that the smooth enlargement falls to black on every side
    framed = Image.fromarray(np.pad(image, margin).astype(np.float32))
    factor = size * np.exp(generator.uniform(*np.log(SCALES))) / max(image.shape)
    large = framed.resize([round(factor * length) for length in framed.size], Image.Resampling.BICUBIC)
    turned = large.rotate(generator.uniform(-MAX_ANGLE, MAX_ANGLE), Image.Resampling.BICUBIC, expand=True)
    left, top = (int(generator.integers(size)) - length // 2 for length in turned.size)
    frame = Image.new("F", (size, size))
    frame.paste(turned, (left, top))
    values = np.asarray(frame, dtype=np.float64).clip(0, 1)
    # The edge is about a pixel wide, and black is never covered.
    coverage = ((values - edge) * max(factor, 0.5 / edge) + 0.5).clip(0, 1)
    return values, coverage, int((np.asarray(turned) >= edge).sum())


def _ink(generator: np.random.Generator, covered: np.ndarray) -> np.ndarray:
    """A random colour that stands out from the mean colour of what it covers; both (3,) in [0, 255]."""
    while True:
        ink = generator.uniform(0, 255, 3)
        if abs((ink - covered) @ LUMA) >= MIN_CONTRAST:
            return ink
