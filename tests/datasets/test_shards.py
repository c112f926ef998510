"""Shards hold what the class folders held, and are read by position."""

from contextlib import suppress

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


def copy_with(folder, copy, **changes):
    """A copy of the shards whose index has other arrays."""
    for path in (folder / "wds").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    with np.load(copy / "train-index.npz") as fields:
        arrays = dict(fields)
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez(copy / "train-index.npz", **{name: array for name, array in arrays.items() if array is not None})


def replace(place, value):
    def change(array):
        array = array.astype(np.int64) if array.dtype.kind in "iu" else array.astype("U99")
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("targets", lambda a: a[:-1], "'names' has 7 entries, 'targets' has 6"),
        ("targets", lambda a: np.append(a, 0), "'names' has 7 entries, 'targets' has 8"),
        ("names", lambda a: a[:3], "'names' has 3 entries, 'targets' has 7"),
        ("shards", lambda a: a[:3], "'shards' has 3 entries"),
        ("offsets", lambda a: np.append(a, a), "'offsets' has 14 entries"),
        ("file_sizes", lambda a: a[:-1], "'file_sizes' has 2 entries, 'files' has 3"),
        ("shards", replace(0, -1), "'shards' must be from 0 to 2; entry 0 is -1"),
        ("shards", replace(6, 3), "'shards' must be from 0 to 2; entry 6 is 3"),
        ("targets", replace(2, 2), "'targets' must be from 0 to 1; entry 2 is 2"),
        ("targets", replace(2, -1), "'targets' must be from 0 to 1; entry 2 is -1"),
        ("offsets", replace(1, -512), "'offsets' must be from 512 to "),
        ("offsets", replace(1, 2**60), "'offsets' must be from 512 to "),
        ("offsets", replace(1, 513), "'offsets' must be multiples of 512"),
        ("sizes", replace(1, 10**6), r"'sizes' must be from 0 to \d+; entry 1 is 1000000"),
        ("sizes", replace(1, -1), "'sizes' must be from 0"),
        ("sizes", lambda a: a.astype(float), r"'sizes' must be a list of whole numbers; .*\(7,\) of float64"),
        ("targets", lambda a: a[:, None], r"'targets' must be a list of whole numbers; .*\(7, 1\)"),
        ("targets", lambda a: a.astype(object), "cannot be read .*pickle"),
        ("classes", lambda a: a[[0, 0]], "'classes' has a name twice"),
        ("files", lambda a: a[[0, 0, 2]], "'files' has a name twice"),
        ("files", replace(0, "../x.tar"), r"'files' must name tar files beside the index; found '\.\./x\.tar'"),
        ("files", replace(0, "/etc/passwd"), r"'files' must .* found '/etc/passwd'"),
        ("files", replace(0, ".."), r"'files' must .* found '\.\.'"),
        ("offsets", lambda a: None, r"cannot be read \(KeyError"),
    ],
)
def test_an_index_whose_arrays_do_not_fit_is_refused(folder, tmp_path, name, change, message):
    copy_with(folder, tmp_path, **{name: change})
    with pytest.raises(ConfigError, match=rf"train-index\.npz: .*{message}"):
        Shards(tmp_path, "train")


def test_an_index_without_images_and_damaged_ones(folder, tmp_path):
    empty = dict.fromkeys(("targets", "names", "shards", "offsets", "sizes"), lambda a: a[:0])
    copy_with(folder, tmp_path, **empty)
    with pytest.raises(ConfigError, match="'targets' is empty"):
        Shards(tmp_path, "train")
    index, whole = tmp_path / "train-index.npz", (folder / "wds" / "train-index.npz").read_bytes()
    generator = np.random.default_rng(0)
    for cut in (0, 1, 100, len(whole) - 5):
        index.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"train-index\.npz: cannot be read"):
            Shards(tmp_path, "train")
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= int(generator.integers(1, 256))
        index.write_bytes(damaged)
        with suppress(ConfigError):  # and nothing else; a change of the archive's date, for instance, does no harm
            Shards(tmp_path, "train")


@pytest.mark.parametrize("in_place", [True, False])
def test_shards_that_are_written_again_are_read_again(folder, tmp_path, in_place):
    def write(split):
        for path in (folder / "wds").glob(f"{split}-*"):
            target = tmp_path / path.name.replace(split, "train")
            if not in_place:
                target.unlink(missing_ok=True)
            content = path.read_bytes()
            if path.suffix == ".npz":
                copy = tmp_path / "copy.npz"
                with np.load(path) as fields:
                    files = np.array([name.replace(split, "train") for name in fields["files"].tolist()])
                    np.savez(copy, **{**fields, "files": files})
                content = copy.read_bytes()
            target.write_bytes(content)

    write("train")
    before = Shards(tmp_path, "train")
    first = before.read(0)
    write("val")
    after = Shards(tmp_path, "train")
    assert after.read(0) == ClassFolders(folder / "images" / "val").read(0) != first
    for index in (0, 6) if in_place else (6,):
        with pytest.raises(ConfigError, match=r"train-00000\d\.tar: has been written again"):
            before.read(index)
    if not in_place:
        assert before.read(0) == first  # of the file that is open still, which its index describes


def test_a_target_that_is_a_file(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "within", tmp_path / ("x" * 300)):
        with pytest.raises(
            ConfigError, match=r"cannot be read or written: (File exists|Not a directory|File name too)"
        ):
            write_shards(ClassFolders(folder / "images" / "train"), target, "train")


@pytest.mark.parametrize("number", [0, -3])
def test_shards_hold_images(folder, tmp_path, number):
    with pytest.raises(ConfigError, match=f"images_per_shard: must be at least 1; found {number}"):
        write_shards(ClassFolders(folder / "images" / "train"), tmp_path, "train", number)
