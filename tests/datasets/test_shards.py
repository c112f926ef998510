"""Shards hold what the class folders held, and are read by position."""

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import ClassFolders, Finish, Shards, build_dataset, build_train_loader, write_shards
from kernelwarehouse.models import read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of three images, and the class folders that they were made from, with seven images in each split."""
    root = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a.b/0.c.jpg", "a.b/1.JPEG", "a.b/1.png", "c/0.jpg", "c/1.jpg", "c/2.jpg", "c/ü.jpg"):
            path = root / "images" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(30, 40, 3), dtype=np.uint8)).save(path)
        write_shards(ClassFolders(root / "images" / split), root / "wds", split, images_per_shard=3)
    return root


def config(path, **fields):
    fixed = {"model": "resnet18", "nb_classes": 2, "input_size": 32, "data_set": "WDS", "data_path": str(path)}
    return read_config({**fixed, "batch_size": 2, "num_workers": 2, "device": "cpu"}, fields)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_images_are_those_of_the_folders(folder, split):
    shards, files = Shards(folder / "wds", split), ClassFolders(folder / "images" / split)
    assert shards.classes == files.classes == ("a.b", "c")
    assert shards.targets.tolist() == files.targets.tolist() == [0, 0, 0, 1, 1, 1, 1]
    for i in reversed(range(7)):
        assert shards.read(i) == files.read(i)
    assert shards.name(6) == f"{folder}/wds/{split}-000002.tar: c/ü.jpg"


def test_the_library_reads_them_as_its_own(folder):
    files = sorted(map(str, (folder / "wds").glob("train-*.tar")))
    assert len(files) == 3
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    source = ClassFolders(folder / "images" / "train")
    assert [int(sample["cls"]) for sample in samples] == source.targets.tolist()
    for i, sample in enumerate(samples):
        assert source.read(i) in sample.values()


def test_a_training_draws_the_same_from_shards_as_from_folders(folder):
    batches = []
    for path, data_set in ((folder / "wds", "WDS"), (folder / "images", "IMNET")):
        parts = config(path, data_set=data_set)
        loader = build_train_loader(build_dataset(parts, train=True), parts.run, finish=Finish(parts))
        batches.append(list(loader))
    for (ours, target), (theirs, expected) in zip(*batches, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(target, expected)


def test_what_is_missing_or_cut_off_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no .*train-index.npz; scripts/make_shards.py"):
        build_dataset(config(tmp_path), train=True)
    for path in (folder / "wds").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"train-000001.tar: 5000 bytes, train-index.npz says 10240; copy or write"):
        build_dataset(config(tmp_path), train=True)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"train-000001.tar: no bytes"):
        build_dataset(config(tmp_path), train=True)


def test_nothing_is_written_over(folder):
    with pytest.raises(ConfigError, match=r"train-.* is there already"):
        write_shards(ClassFolders(folder / "images" / "train"), folder / "wds", "train")


def test_an_interrupted_writing_leaves_nothing_that_could_be_taken_for_whole(folder, tmp_path):
    def interrupt(images):
        yield from list(images)[:4]
        raise KeyboardInterrupt

    source = ClassFolders(folder / "images" / "train")
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, tmp_path, "train", 3, interrupt)
    assert not list(tmp_path.glob("train-*"))
    assert write_shards(source, tmp_path, "train", 3) == 3
    assert not list(tmp_path.glob(".*"))
