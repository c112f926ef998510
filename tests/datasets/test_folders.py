"""What lies in class folders beside images of classes: left out where it is a system's, named where it is a fault."""

import errno
import os

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import ClassFolders, build_dataset, build_datasets, build_train_loader
from kernelwarehouse.datasets.folders import printable
from kernelwarehouse.models import read_config


def add(path, size=(8, 8)):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path, "PNG")


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for name in ("cat/0.png", "cat/deep/1.png", "cat/deep er/2.png", "cat/deep/er/3.png", "dog/0.PNG"):
            add(tmp_path / split / name)
    return tmp_path


def config(root, **fields):
    fixed = {"model": "resnet18", "data_set": "IMNET", "data_path": str(root), "nb_classes": 2, "input_size": 32}
    return read_config({**fixed, "num_workers": 0, "batch_size": 4, "device": "cpu", **fields})


def test_images_come_in_torchvisions_order(root):
    ours, theirs = ClassFolders(root / "train"), ImageFolder(root / "train")
    assert [ours.path(i) for i in range(5)] == [path for path, _ in theirs.samples]
    assert ours.targets.tolist() == theirs.targets
    assert list(ours.classes) == theirs.classes


SYSTEM = [".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX", "lost+found", ".Trash-1000", "#recycle", "$RECYCLE.BIN"]
SYSTEM += ["System Volume Information", "__pycache__", ".DS_Store", "LOST+FOUND"]


@pytest.mark.parametrize("name", SYSTEM)
def test_hidden_and_system_folders_are_no_classes_and_hold_no_images(root, name):
    add(root / "train" / name / "0.png")
    add(root / "train" / "cat" / name / "0.png")
    (root / "val" / name).mkdir()
    add(root / "val" / "cat" / "._0.png")
    train, held_out = build_datasets(config(root))
    assert (train.classes, len(train), len(held_out)) == (("cat", "dog"), 5, 5)


def test_a_class_of_one_part_only_is_named_before_the_number_of_classes(root):
    """Else the advice on --nb_classes would lead from one number to the other and back."""
    add(root / "train" / "cow" / "0.png")
    for number in (2, 3):
        with pytest.raises(ConfigError, match=r"only for training \['cow'\], only for evaluation \[\]"):
            build_datasets(config(root, nb_classes=number))


def link_to_self(folder):
    (folder / "loop").symlink_to(folder / "loop")


def link_to_parent(folder):
    (folder / "up").symlink_to(folder.parent)


def link_to_nothing(folder):
    (folder / "1.png").symlink_to(folder / "absent.png")


def fifo(folder):
    os.mkfifo(folder / "1.png")


def too_long(folder):
    """Deeper than the system's longest path, by steps that each are short."""
    back = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.fchdir(back)
        os.close(back)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (link_to_self, r"loop: cannot be read: .*symbolic links"),
        (link_to_parent, r"up/cat: is a link to a folder that it lies in"),
        (link_to_nothing, r"cat/1\.png: is not a file"),
        (fifo, r"cat/1\.png: is not a file"),
        (too_long, r"ddd: cannot be read: File name too long"),
    ],
)
def test_what_cannot_be_listed_or_read_is_named(root, make, message):
    make(root / "train" / "cat")
    with pytest.raises(ConfigError, match=message):
        ClassFolders(root / "train")


@pytest.mark.parametrize("folder", ["train", "train/cat", "train/cat/deep"])
def test_an_unreadable_folder_is_named(root, monkeypatch, folder):
    """The system's refusal is made here, since a test may run as root, who reads everything."""
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path) == os.fspath(root / folder):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=rf"{folder}: cannot be read: Permission denied"):
        ClassFolders(root / "train")


@pytest.mark.parametrize("path", ["x" * 300, "x/" * 3000, "a\0b"])
def test_no_such_data_path(path):
    with pytest.raises(ConfigError, match=r"no folder .*; expected one folder per class"):
        build_dataset(config(path), train=True)


def test_names_that_are_not_utf_8(tmp_path):
    try:
        add(os.fsencode(tmp_path) + b"/train/caf\xe9/\xff\n.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    source = ClassFolders(tmp_path / "train")
    assert source.classes == (r"caf\udce9",)
    assert source.name(0) == rf"{tmp_path}/train/caf\udce9/\udcff\n.png"
    assert source.read(0).startswith(b"\x89PNG")
    assert printable("Köln/猫 1.jpg") == "Köln/猫 1.jpg"


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (1, 500)])
def test_images_of_a_pixel_are_trained_on(tmp_path, size):
    for i in range(4):
        add(tmp_path / "train" / str(i % 2) / f"{i}.png", size)
    for aa in (None, "rand-m9-mstd0.5-inc1"):
        parts = config(tmp_path, aa=aa, reprob=0)
        dataset = build_dataset(parts, train=True)
        for _ in range(10):
            for images, _ in build_train_loader(dataset, parts.run):
                assert images.shape == (4, 3, 32, 32)
    if size == (1, 1):
        parts = config(tmp_path, aa=None, reprob=0, color_jitter=0)
        assert torch.equal(build_dataset(parts, train=True)[0][0][:, 5, 5], torch.tensor([9, 99, 199]).byte())
