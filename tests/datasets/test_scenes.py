"""Drawn scenes: the masks are what the picture shows."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import scenes
from kernelwarehouse.datasets.scenes import (
    MIN_CONTRAST,
    MIN_VISIBLE,
    Cutouts,
    draw_scene,
    load_backgrounds,
    load_digits,
    load_fashion,
)

SQUARES = Cutouts(np.ones((1, 8, 8)), np.array([0]), ("square",), edge=0.4)
GREY = [Image.new("RGB", (200, 200), (120, 120, 120))]


def draw(seed, cutouts=SQUARES, backgrounds=GREY, size=96, max_objects=6):
    return draw_scene(np.random.default_rng(seed), cutouts, backgrounds, size, max_objects)


@pytest.mark.parametrize("seed", range(20))
def test_a_picture_differs_from_its_background_exactly_where_a_mask_says(seed):
    scene = draw(seed)
    image, shown = scene.image.astype(int), scene.masks.any(axis=0)
    background = np.median(image[~shown], axis=0)
    away = np.abs(image - background).max(axis=2)
    assert away[~binary_dilation(shown, iterations=2)].max(initial=0) == 0
    # An object that lies on another stands out from that, not always from the background.
    assert np.median(away[shown]) > MIN_CONTRAST / 2


@pytest.mark.parametrize("seed", range(20))
def test_what_a_mask_covers_belongs_to_one_object(seed):
    """Squares of one colour each: a wrong order of occlusion would leave another's colour in a mask."""
    scene = draw(seed)
    inside = [binary_erosion(mask, iterations=4) for mask in scene.masks]
    colours = [np.ptp(scene.image[mask].astype(int), axis=0).max() for mask in inside if mask.any()]
    assert colours
    assert max(colours) < MIN_CONTRAST / 4


def test_objects_overlap_and_leave_the_frame_but_not_too_far():
    drawn = [draw(seed) for seed in range(100)]
    visible = np.concatenate([scene.visible for scene in drawn])
    assert visible.min() >= MIN_VISIBLE
    assert visible.max() == 1
    assert 0.1 < (visible < 0.95).mean() < 0.9
    for scene in drawn:
        assert scene.masks.sum(axis=0).max() == 1
        assert scene.masks.any(axis=(1, 2)).all()
        full = scene.masks.sum(axis=(1, 2)) / scene.visible
        assert (full < (0.5 * 96 + 2) ** 2).all()
        assert (full > (0.2 * 96 - 2) ** 2).all()


def test_a_scene_holds_between_one_and_the_most_objects():
    counts = [len(draw(seed, max_objects=3).targets) for seed in range(60)]
    assert set(counts) == {1, 2, 3}


@pytest.mark.parametrize("size", [64, 101])
def test_digits_are_drawn_with_their_names_at_every_size(size):
    digits = load_digits(train=True)
    drawn = [draw(seed, digits, load_backgrounds(train=True), size) for seed in range(30)]
    for scene in drawn:
        assert scene.image.shape == (size, size, 3)
        assert scene.masks.shape == (len(scene.targets), size, size)
    assert {target for scene in drawn for target in scene.targets} == set(range(10))


def test_a_digit_is_drawn_as_it_is(monkeypatch):
    """Its mask, brought back to eight pixels, is the digit's own ink."""
    monkeypatch.setattr(scenes, "MAX_ANGLE", 0.0)
    digits, scores = load_digits(train=True), []
    for number in range(20):
        one = Cutouts(digits.images[number][None], digits.targets[number][None], digits.classes, digits.edge)
        scene = draw(number, one, GREY, 200, max_objects=1)
        if scene.visible[0] == 1:
            mask, ink = scene.masks[0], one.images[0] > digits.edge
            mask, ink = (m[m.any(axis=1)][:, m.any(axis=0)] for m in (mask, ink))
            small = Image.fromarray(mask.astype(np.float32)).resize(ink.shape[::-1], Image.Resampling.BOX)
            scores.append(np.corrcoef(np.asarray(small).ravel(), ink.ravel())[0, 1])
    assert len(scores) >= 10
    assert min(scores) > 0.7


def test_evaluation_shows_other_digits_on_other_regions():
    parts = [load_digits(train).images.reshape(-1, 64) for train in (True, False)]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 1437 + 360
    train, held_out = load_backgrounds(train=True), load_backgrounds(train=False)
    assert [image.size for image in train + held_out] == [(320, 427)] * 4
    for left, right in zip(train, held_out, strict=True):
        assert np.abs(np.asarray(left).astype(int) - np.asarray(right)).mean() > 10


def test_the_same_generator_draws_the_same_scene():
    digits, backgrounds = load_digits(train=True), load_backgrounds(train=True)
    first, again, other = (draw(seed, digits, backgrounds) for seed in (3, 3, 4))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    assert not np.array_equal(first.image, other.image)


def test_garments_are_read_as_torchvision_keeps_them(tmp_path):
    with pytest.raises(ConfigError, match=r"does not hold the files of Fashion-MNIST"):
        load_fashion(True, tmp_path)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 3)):
        pixels, labels = generator.integers(256, size=(count, 28, 28)), np.arange(count)
        for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes()
            (raw / f"{prefix}-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    train, held_out = (load_fashion(part, tmp_path) for part in (True, False))
    assert (train.images.shape, held_out.images.shape) == ((6, 28, 28), (3, 28, 28))
    assert train.targets.tolist() == [0, 1, 2, 3, 4, 5]
    assert held_out.classes[9] == "Ankle boot"
    assert held_out.images.max() <= 1
    assert draw(0, train, load_backgrounds(train=True)).masks.any()
