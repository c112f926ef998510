"""Names of classes that do not fit the annotations or the heads: an error with both lists, and nothing is trained."""

import json
import re

import pytest

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.detection import train
from kernelwarehouse.detection.labels import CheckedCOCO, check_names

NO_VAL = ("val_dataloader=None", "val_evaluator=None", "val_cfg=None")
CLASSES = "train_dataloader.dataset.metainfo.classes"
LISTS = r"; classes \(.*\); categories of the file \('red', 'green'\)"


@pytest.fixture
def train_with(tiny_config, tmp_path):
    """A function that starts to train on annotations that may be changed first; mmengine's log of it is kept."""

    def start(*options, change=None, content=None):
        options = [*options]
        if change:
            change(content)
            (tmp_path / "changed.json").write_text(json.dumps(content))
            options.append(f"train_dataloader.dataset.ann_file={tmp_path / 'changed.json'}")
        command = [str(tiny_config), "--work-dir", str(tmp_path / "work"), "--cfg-options", "train_cfg.max_epochs=1"]
        train.main([*command, *options])

    return start


@pytest.fixture
def content(scenes):
    return json.loads((scenes / "annotations.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([f"{CLASSES}=(rde,green)"], rf"not in the file: \('rde'\){LISTS}"),
        (
            ["train_dataloader.dataset.metainfo=None"],
            r"not in the file: \('person', .*'toothbrush'\); classes \('person'",
        ),
        (["model.roi_head.mask_head.num_classes=3"], r"mask_head.num_classes': 3, but .* lists 2: \('red', 'green'\)"),
        (
            ["val_dataloader.dataset.metainfo.classes=(red,)"],
            r"val_.*classes': \('red'\), but train_.*\('red', 'green'\)",
        ),
    ],
)
def test_nothing_is_trained(train_with, options, message):
    with pytest.raises(ConfigError, match=message):
        train_with(*options)


def loaded(content):
    file = CheckedCOCO()
    file.dataset, file.path = content, "file.json"
    return file


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "dog"), rf"not in the file: \('cat', 'dog'\){LISTS}"),
        (("Red", "green"), rf"not in the file: \('Red'\){LISTS}"),
        (("red ", "green"), rf"not in the file: \('red '\){LISTS}"),
        (("green", "red"), rf"not in the file's order.*{LISTS}"),
        (("red", "green", "red"), rf"there twice: \('red'\){LISTS}"),
        ("red", r"'red' is one word, not a list; write \('red',\)"),
        ((1, 2), rf"not in the file: \(1, 2\){LISTS}"),
    ],
)
def test_names_are_compared(content, classes, message):
    with pytest.raises(ConfigError, match=message):
        loaded(content).get_cat_ids(classes)


def reorder(content):
    content["categories"].reverse()


def rename(content):
    content["categories"][0]["name"] = "crimson"


def stray(content):
    content["annotations"][0]["category_id"] = 7


def repeat(content):
    content["categories"].append({"id": 3, "name": "red"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reorder, r"not in the file's order.*classes \('red', 'green'\); categories of the file \('green', 'red'\)"),
        (rename, r"not in the file: \('red'\).*\('crimson', 'green'\)"),
        (stray, r"file.json: boxes of categories \[7\] that it does not list"),
        (repeat, r"there twice: \('red'\)"),
    ],
)
def test_annotations_are_compared(content, change, message):
    change(content)
    with pytest.raises(ConfigError, match=message):
        loaded(content).get_cat_ids(("red", "green"))


def test_some_of_the_categories_are_enough(content):
    check_names(("green",), loaded(content), "file.json")


def test_images_without_a_box(train_with, content):
    with pytest.raises(ConfigError, match="not one of its 4 images has a box to learn from"):
        train_with(*NO_VAL, change=lambda content: content["annotations"].clear(), content=content)


def test_the_evaluator_reads_the_same_names(train_with, content, tmp_path):
    reorder(content)
    (tmp_path / "reordered.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"val_evaluator\.ann_file: .*not in the file's order"):
        train_with(f"val_evaluator.ann_file={tmp_path / 'reordered.json'}")


def test_boxes_of_each_class_are_printed(train_with, content, capfd):
    def drop(content):
        content["annotations"] = content["annotations"][:-1]

    train_with(*NO_VAL, change=drop, content=content)
    out, err = capfd.readouterr()
    assert re.search(r"4 images to train; boxes for each class: red 4, green 3\n", out + err)
