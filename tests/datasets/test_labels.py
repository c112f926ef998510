"""Other labels than the images' own."""

import json
import os

import pytest
import torch

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import UNLABELLED, Digits, Relabelled


@pytest.fixture
def digits():
    return Digits(train=False)


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def test_one_several_and_no_label(digits, tmp_path):
    entries = [[3], [1, 2], [], 7, *([[0]] * 356)]
    data = Relabelled(digits, write(tmp_path / "real.json", entries))
    assert [data[i][1].tolist() for i in range(4)] == [[3, -1], [1, 2], [-1, -1], [7, -1]]
    assert torch.equal(data[3][0], digits[3][0])
    assert (len(data), data.classes) == (360, digits.classes)


def test_an_image_that_cannot_be_read_stays_without_a_label(digits, tmp_path):
    digits.targets[1] = UNLABELLED
    data = Relabelled(digits, write(tmp_path / "real.json", [[3]] * 360))
    assert (data[0][1].tolist(), data[1][1].tolist()) == ([3], [-1])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([[1]] * 359, "must list labels for each of the 360 images, holds a list of 359"),
        ({"a": 1}, "holds dict"),
        ([[1]] * 359 + [[10]], r"image 359: classes are whole numbers from 0 to 9, found \[10\]"),
        ([["cat"]] * 360, r"image 0: .* found \['cat'\]"),
    ],
)
def test_a_file_that_does_not_fit(digits, tmp_path, entries, message):
    with pytest.raises(ConfigError, match=rf"'eval_labels': .*labels.json.*{message}"):
        Relabelled(digits, write(tmp_path / "labels.json", entries))


def test_no_such_file_or_no_json(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"'eval_labels': .*absent.json"):
        Relabelled(digits, tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("[[1], ")
    with pytest.raises(ConfigError, match=r"'eval_labels': .*broken.json"):
        Relabelled(digits, tmp_path / "broken.json")


def test_a_label_that_is_listed_twice_counts_once(digits, tmp_path):
    data = Relabelled(digits, write(tmp_path / "real.json", [[3, 3], [2, 1, 2, 1], *([[0, 0, 0]] * 358)]))
    assert [data[i][1].tolist() for i in range(3)] == [[3, -1], [2, 1], [0, -1]]


@pytest.mark.parametrize("text", ["[" * 100_000, f"[{'9' * 5000}]", "\udcff", "", "[[1], NaN]", "nul\0"])
def test_files_that_no_reader_takes(digits, tmp_path, text):
    (tmp_path / "labels.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"'eval_labels': .*labels\.json") as error:
        Relabelled(digits, tmp_path / "labels.json")
    assert len(str(error.value)) < 600


def test_what_is_no_file(digits, tmp_path):
    with pytest.raises(ConfigError, match=r"'eval_labels': .* is no file"):
        Relabelled(digits, tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ConfigError, match=r"'eval_labels': .*fifo is no file"):
            Relabelled(digits, tmp_path / "fifo")
