"""Encoded images, whole and damaged."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import UNLABELLED, DataError, Finish, build_dataset, build_train_loader
from kernelwarehouse.datasets.photographs import decode
from kernelwarehouse.models import read_config

DAMAGED = ("cat/1.jpg", "cat/2.jpg", "dog/4.jpg")


def encoded(kind="JPEG", mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes; three of them are cut off, empty and no image at all."""
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                (tmp_path / split / name / f"{i}.jpg").write_bytes(encoded(seed=6 * label + i))
        (tmp_path / split / DAMAGED[0]).write_bytes(encoded()[:700])
        (tmp_path / split / DAMAGED[1]).write_bytes(b"")
        (tmp_path / split / DAMAGED[2]).write_bytes(b"<html>")
    return tmp_path


def config(folder, **fields):
    fixed = {"model": "resnet18", "nb_classes": 2, "input_size": 32, "data_set": "IMNET", "data_path": str(folder)}
    return read_config({**fixed, "aa": None, "reprob": 0, "batch_size": 4, "num_workers": 2, "device": "cpu"}, fields)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("BMP", "RGB"), ("WEBP", "RGB")],
)
def test_images_are_decoded_as_by_pillow(kind, mode):
    data = encoded(kind, mode)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_named_on_one_line(folder, name, train):
    dataset = build_dataset(config(folder), train)
    index = next(i for i in range(12) if dataset.name(i).endswith(name))
    with pytest.raises(DataError) as error:
        dataset[index]
    assert str(error.value).startswith(str(folder / ("train" if train else "val") / name))
    assert "--skip_corrupt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_its_message_survives_a_worker(folder, workers):
    parts = config(folder, num_workers=workers)
    loader = build_train_loader(build_dataset(parts, train=True), parts.run)
    with pytest.raises(ConfigError) as error:
        list(loader)
    assert re.fullmatch(rf"{folder}/train/\w+/\d.jpg: cannot be read \(.*\), the first such .*", str(error.value))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_passes_over_damaged_images_and_takes_their_neighbours(folder, workers):
    parts = config(folder, skip_corrupt=3, num_workers=workers)
    dataset = build_dataset(parts, train=True)
    assert [dataset[i][1] for i in range(12)] == [0] * 6 + [1] * 6
    dataset.corrupt.zero_()
    batches = list(build_train_loader(dataset, parts.run))
    assert [len(targets) for _, targets in batches] == [4, 4, 4]
    assert {dataset.name(i) for i in dataset.corrupt.nonzero()} == {str(folder / "train" / name) for name in DAMAGED}


def test_an_image_that_is_met_twice_counts_once(folder):
    dataset = build_dataset(config(folder, skip_corrupt=3), train=True)
    for _ in range(3):
        assert [dataset[i][1] for i in range(12)] == [0] * 6 + [1] * 6


def test_too_many_damaged_images_stop_the_run(folder):
    dataset = build_dataset(config(folder, skip_corrupt=2), train=True)
    with pytest.raises(DataError, match=r"dog/4.jpg.*the last of 3 such images; pass a larger --skip_corrupt than 2"):
        [dataset[i] for i in range(12)]


def test_damaged_images_are_not_evaluated(folder):
    dataset = build_dataset(config(folder, skip_corrupt=3), train=False)
    targets = [dataset[i][1] for i in range(12)]
    assert [i for i in range(12) if targets[i] == UNLABELLED] == [1, 2, 10]
    assert dataset[1][0].shape == dataset[0][0].shape == torch.Size([3, 32, 32])


def test_nothing_but_damaged_images(folder):
    for path in (folder / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="not one of its 12 images can be decoded"):
        build_dataset(config(folder, skip_corrupt=99), train=True)[0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_over_epochs(tmp_path):
    """Twenty more epochs over 12 photographs of half a megabyte each would show a single one that is kept."""
    for i in range(12):
        path = tmp_path / "train" / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((500, 375), 50).convert("RGB").save(path)
    parts = config(tmp_path, num_workers=0, aa="rand-m9-mstd0.5-inc1", reprob=0.25)
    loader = build_train_loader(build_dataset(parts, train=True), parts.run, finish=Finish(parts))

    def megabytes_after(epochs):
        for _ in range(epochs):
            assert len(list(loader)) == 3
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    before = megabytes_after(10)
    assert megabytes_after(20) - before < 10
