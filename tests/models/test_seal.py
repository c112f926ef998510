"""Damage of every kind is noticed by the one reader, or does not matter."""

import random
import zipfile

import pytest
import safetensors.torch
import torch

from kernelwarehouse.models import CheckpointError, read_checkpoint, seal

CONTENT = {"model": {"w": torch.arange(40.0), "n": torch.tensor(3)}, "epoch": 3, "text": "words"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a sealed and of a plain file."""
    found = {}
    for name in ("sealed", "plain"):
        path = tmp_path_factory.mktemp("files") / f"{name}.pth"
        with path.open("w+b") as file:
            torch.save(CONTENT, file)
            if name == "sealed":
                seal(file)
        found[name] = path.read_bytes()
    return found


def is_refused(path):
    """Whether a file is refused, in one line that names it; what is read otherwise is what was written."""
    message = None
    try:
        content = read_checkpoint(path)
    except CheckpointError as e:
        message = str(e)
    else:
        assert str(content) == str(CONTENT)
    assert message is None or (str(path) in message and "\n" not in message)
    return message is not None


@pytest.mark.parametrize("kind", ["sealed", "plain"])
def test_every_byte_of_a_file_may_be_damaged(files, kind, tmp_path):
    whole, path, draw = files[kind], tmp_path / "c.pth", random.Random(0)
    refused = 0
    for place in range(draw.randrange(2), len(whole), 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        refused += is_refused(path)
    assert refused >= len(whole) // (2 if kind == "sealed" else 8)


def test_the_directory_of_a_plain_file_may_be_damaged(files, tmp_path):
    whole, path = files["plain"], tmp_path / "c.pth"
    start = whole.rfind(b"PK\x01\x02", 0, whole.rfind(b"archive/.data")) - 600
    for place in range(start, start + 120, 2):
        for bit in range(0, 8, 2):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            is_refused(path)


def test_a_member_that_is_said_to_be_a_folder(files, tmp_path):
    """One bit, by which torch would take the tensor's values from what the memory held."""
    whole = bytearray(files["plain"])
    (member,) = [i for i in range(len(whole)) if whole.startswith(b"PK\x01\x02", i) and b"data/1" in whole[i : i + 64]]
    whole[member + 38] |= 0x10
    (tmp_path / "c.pth").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"data/1 is said to be a folder"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("kind", ["sealed", "plain"])
def test_what_is_cut_or_added(files, kind, tmp_path):
    whole, path = files[kind], tmp_path / "c.pth"
    for size in [*range(0, len(whole), 50), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:size])
        assert is_refused(path)
    for more in (b"\0", b"more", whole):
        path.write_bytes(whole + more)
        assert is_refused(path) or more == whole
    path.write_bytes(whole[:100] + whole[164:])
    assert is_refused(path)


def rewritten(whole, path, change, **options):
    """Write the members of a zip archive anew, each as `change` gives them: pairs of a name and bytes."""
    source = path.with_suffix(".zip")
    source.write_bytes(whole)
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w", **options) as target:
        for info in archive.infolist():
            for name, content in change(info.filename, archive.read(info)):
                target.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(files, tmp_path):
    """Torch takes one, and other readers the other; it knows no upper and lower case."""
    path, other = tmp_path / "c.pth", torch.full((40,), 7.0).numpy().tobytes()
    for again in ("archive/data/0", "ARCHIVE/data/0"):
        rewritten(files["plain"], path, lambda n, c: [(n, c)] + [(again, other)] * (n == "archive/data/0"))  # noqa: B023
        with pytest.raises(CheckpointError, match=r"c\.pth: damaged: .*two members of the name archive/data/0"):
            read_checkpoint(path)


def test_what_others_write_is_read(files, tmp_path):
    """Compressed, with a comment, and in torch's older format, which has no sums."""
    path = tmp_path / "c.pth"
    rewritten(files["plain"], path, lambda n, c: [(n, c)], compression=zipfile.ZIP_DEFLATED)
    assert not is_refused(path)
    for comment in (b"a comment", b"x" * 1000):
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = comment
        assert not is_refused(path)
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert not is_refused(path)


def test_a_damaged_member_of_a_compressed_file(files, tmp_path):
    path = tmp_path / "c.pth"
    rewritten(files["plain"], path, lambda n, c: [(n, c)], compression=zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 10):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        refused += is_refused(path)
    assert refused > len(whole) / 40


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pth: is not a file"):
        read_checkpoint(tmp_path / "folder.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth: no such checkpoint"):
        read_checkpoint(tmp_path / "none.pth")


def test_safetensors_that_name_a_tensor_twice(tmp_path):
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2), "b": torch.ones(2)}, path)
    assert read_checkpoint(path)["b"].tolist() == [1, 1]
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"a"'))
    with pytest.raises(CheckpointError, match=r"c\.safetensors: .*two entries of one name"):
        read_checkpoint(path)
