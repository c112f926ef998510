"""Data that cannot be used is named before the first step."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import build_dataset, build_datasets
from kernelwarehouse.models import read_config


def config(path="", **fields):
    fixed = {"model": "resnet18", "data_set": "IMNET", "data_path": str(path), "nb_classes": 2, "input_size": 32}
    return read_config({**fixed, **fields})


def make_folders(root, train="cat dog", val="cat dog"):
    for split, classes in (("train", train), ("val", val)):
        for name in classes.split():
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(root / split / name / "0.png")
    return root


@pytest.mark.parametrize("data_set", ["IMNET", "image_folder"])
def test_class_folders(tmp_path, data_set):
    train, held_out = build_datasets(config(make_folders(tmp_path), data_set=data_set))
    image, target = train[1]
    assert image.pixels.shape == (3, 32, 32)
    assert (target, len(held_out)) == (1, 2)


def test_evaluation_folder_of_its_own(tmp_path):
    make_folders(tmp_path)
    fields = {"data_set": "image_folder", "eval_data_path": str(tmp_path / "val")}
    train, held_out = build_datasets(config(tmp_path / "train", **fields))
    assert (train.root, held_out.root) == (tmp_path / "train", tmp_path / "val")


@pytest.mark.parametrize("data_set", ["IMNET", "image_folder", "CIFAR10", "CIFAR100", "FMNIST"])
def test_a_path_is_needed(data_set):
    with pytest.raises(ConfigError, match=rf"'data_path': {data_set} is read from a folder; pass --data_path"):
        build_dataset(config(data_set=data_set), train=True)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_split_is_named(tmp_path, missing):
    make_folders(tmp_path, **{missing: ""})
    with pytest.raises(ConfigError, match=rf"no folder .*{missing}; expected one folder per class"):
        build_datasets(config(tmp_path))


def test_a_folder_without_classes_is_named(tmp_path):
    make_folders(tmp_path, val="")
    (tmp_path / "val").mkdir()
    with pytest.raises(ConfigError, match=r"any class folder in .*val"):
        build_datasets(config(tmp_path))


def test_an_empty_class_is_named(tmp_path):
    make_folders(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(ConfigError, match=r"train.* no valid file for the classes cow"):
        build_datasets(config(tmp_path, nb_classes=3))


def test_different_classes_are_listed(tmp_path):
    make_folders(tmp_path, val="cat cow")
    with pytest.raises(ConfigError, match=r"only for training \['dog'\], only for evaluation \['cow'\]"):
        build_datasets(config(tmp_path))


@pytest.mark.parametrize(("data_set", "found"), [("IMNET", 2), ("DIGITS", 10)])
def test_another_number_of_classes_than_the_model_has(tmp_path, data_set, found):
    path = make_folders(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"the model has 5 classes, {data_set}.* has {found}; pass --nb_classes {found}"
    ):
        build_dataset(config(path, data_set=data_set, nb_classes=5), train=True)


@pytest.mark.parametrize("data_set", ["CIFAR10", "CIFAR100", "FMNIST"])
def test_nothing_is_downloaded(tmp_path, data_set):
    with pytest.raises(ConfigError, match=rf"{tmp_path} does not hold the files of {data_set}.*download=True"):
        build_dataset(config(tmp_path, data_set=data_set), train=True)
    assert not list(tmp_path.rglob("*.gz"))


def test_torchvision_files_are_read(tmp_path, monkeypatch):
    """With a stand-in for CIFAR-10's files: their format is torchvision's affair."""
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8).numpy()

    def load(self, root, train, transform, download):
        assert not download
        self.root, self.transform, self.target_transform = root, transform, None
        self.data, self.targets, self.classes = images, [0, 1, 0, 1], ["a", "b"]

    monkeypatch.setattr(CIFAR10, "__init__", load)
    image, target = build_dataset(config(tmp_path, data_set="CIFAR10"), train=True)[1]
    assert image.pixels.shape == (3, 32, 32)
    assert target == 1


def idx(array, header=None):
    """An idx file of bytes; `header` lies about the shape."""
    shape = array.shape if header is None else header
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + array.tobytes()


IMAGES, LABELS = np.zeros((4, 28, 28), np.uint8), np.arange(4, dtype=np.uint8)


def fashion(root, images, labels):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return config(root, data_set="FMNIST", nb_classes=10)


def test_idx_files_are_read(tmp_path):
    dataset = build_dataset(fashion(tmp_path, idx(IMAGES), idx(LABELS)), train=True)
    assert [dataset[i][1] for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(IMAGES), idx(np.zeros(5, np.uint8)), "4 images and 5 labels"),
        (idx(IMAGES), idx(np.zeros(3, np.uint8)), "4 images and 3 labels"),
        (idx(IMAGES), idx(LABELS + 7), "labels from 7 to 10, expected 0 to 9"),
        (idx(IMAGES[:0]), idx(LABELS[:0]), ""),
        (idx(IMAGES)[:-1], idx(LABELS), ""),
        (idx(IMAGES)[:9], idx(LABELS), ""),
        (idx(IMAGES), b"", ""),
        (b"<html>", idx(LABELS), ""),
        (idx(IMAGES, (2**31 - 1, 28, 28)), idx(LABELS), ""),
        (idx(IMAGES[:, :14], (4, 14, 28)), idx(LABELS), "images of 14 × 28 pixels, expected 28 × 28"),
        (idx(IMAGES[0]), idx(LABELS), ""),
        (idx(LABELS), idx(IMAGES), ""),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, images, labels, message):
    with pytest.raises(ConfigError, match=rf"{tmp_path}: damaged files of FMNIST: .*{message}"):
        build_dataset(fashion(tmp_path, images, labels), train=True)
