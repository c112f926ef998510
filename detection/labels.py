"""Names of classes, compared with those of the annotations and the number of the heads, before anything is trained.

mmdetection looks names up in the annotation file and numbers them by that file's order: boxes of a name that is spelt
otherwise are left out, and a list in another order puts each name on another label.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmengine.runner import Runner
from torch import nn

from ..configs.schema import ConfigError

HEADS = re.compile(r"(?:^|\.)(?:bbox|mask)_head(?:\.\d+)?$")


class CheckedCOCO(COCO):
    """mmdetection's index of an annotation file, which refuses names of classes that do not fit the file."""

    def __init__(self, annotation_file: str | None = None):
        super().__init__(annotation_file)
        self.path = annotation_file

    def get_cat_ids(self, cat_names: Any = (), sup_names: Any = (), cat_ids: Any = ()) -> list[int]:
        """The numbers of the categories, by the file's order; see `check_names` for what is raised."""
        if cat_names:
            check_names(cat_names, self, self.path)
        return super().get_cat_ids(cat_names, sup_names, cat_ids)


def install() -> None:
    """Let mmdetection's data sets in COCO's format check their names when they are built."""
    if CocoDataset.COCOAPI is COCO:
        CocoDataset.COCOAPI = CheckedCOCO


def check_names(classes: Any, file: COCO, path: Any) -> None:
    """Compare the classes of a data set with an annotation file.

    The classes may be some of the file's categories, in the file's order.

    Raises:
        ConfigError: A class that the file does not know, another order, a name that comes twice, or boxes of a category
            that the file does not list; the message has both lists.
    """
    listed = file.dataset.get("categories", [])
    names = [category["name"] for category in listed]
    where = f"{path}: metainfo.classes"
    lists = f"classes {_shown(classes)}; categories of the file {_shown(names)}"
    if isinstance(classes, str):
        raise ConfigError(f"{where}: {classes!r} is one word, not a list; write ({classes!r},)")
    if unknown := [name for name in classes if name not in names]:
        raise ConfigError(f"{where}: not in the file: {_shown(unknown)}; {lists}")
    if twice := [name for many in (classes, names) for name, count in Counter(many).items() if count > 1]:
        raise ConfigError(f"{where}: there twice: {_shown(twice)}; {lists}")
    if list(classes) != [name for name in names if name in set(classes)]:
        raise ConfigError(f"{where}: not in the file's order, by which labels are numbered; {lists}")
    strays = {box["category_id"] for box in file.dataset.get("annotations", [])} - {c["id"] for c in listed}
    if strays:
        raise ConfigError(f"{path}: boxes of categories {sorted(strays, key=str)[:10]} that it does not list; {lists}")


def check_labels(runner: Runner, model: nn.Module, *loops: str) -> None:
    """Compare the classes of what the loops "train", "val" and "test" read with each other, their files and the heads.

    Prints how many boxes each class has in training.

    Args:
        runner: Its loops are built.
        model: The detector.
        *loops: Those to look at.

    Raises:
        ConfigError: As `check_names`; loops with different classes, heads for another number, training without boxes.
    """
    first: tuple[str, Sequence[str]] | None = None
    for loop in loops:
        built = getattr(runner, f"{loop}_loop")
        for dataset in datasets_in(built.dataloader.dataset):
            classes = getattr(dataset, "metainfo", {}).get("classes")
            if classes is None:
                continue
            where = f"{loop}_dataloader.dataset.metainfo.classes"
            first = first or (where, classes)
            if list(first[1]) != list(classes):
                raise ConfigError(f"field '{where}': {_shown(classes)}, but {first[0]} has {_shown(first[1])}")
            for name, head in _heads(model):
                if head.num_classes != len(classes):
                    raise ConfigError(
                        f"field 'model.{name}.num_classes': {head.num_classes}, but {where} lists {len(classes)}: "
                        f"{_shown(classes)}"
                    )
            for metric in getattr(getattr(built, "evaluator", None), "metrics", ()):
                file = getattr(metric, "_coco_api", None)
                if type(file) is COCO and isinstance(dataset, CocoDataset):
                    check_names(classes, file, f"{loop}_evaluator.ann_file")
        if loop == "train":
            _say_boxes(runner, built.dataloader.dataset)


def datasets_in(dataset: Any) -> Iterator[Any]:
    """The data sets within wrappers, such as RepeatDataset or ConcatDataset."""
    inner = getattr(dataset, "datasets", None) or ([dataset.dataset] if hasattr(dataset, "dataset") else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from datasets_in(part)


def _heads(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Heads that tell the classes of a data set apart, with their names."""
    for name, module in model.named_modules():
        told = isinstance(getattr(module, "num_classes", None), int) and not getattr(module, "class_agnostic", False)
        if HEADS.search(name) and told and not name.startswith(("backbone.", "rpn_head")):
            yield name, module


def _say_boxes(runner: Runner, dataset: Any) -> None:
    counts, images, classes = Counter(), 0, ()
    for part in datasets_in(dataset):
        if not hasattr(part, "get_data_info") or not getattr(part, "metainfo", {}).get("classes"):
            return
        classes, images = part.metainfo["classes"], images + len(part)
        for index in range(len(part)):
            boxes = part.get_data_info(index).get("instances", ())
            counts.update(box["bbox_label"] for box in boxes if not box.get("ignore_flag"))
    if not counts:
        raise ConfigError(f"train_dataloader: not one of its {images} images has a box to learn from")
    boxes = ", ".join(f"{name} {counts[label]}" for label, name in enumerate(classes))
    runner.logger.info(f"{images} images to train; boxes for each class: {boxes}")


def _shown(names: Sequence[Any]) -> str:
    """A list of names, shortened where it is long; COCO's fit."""
    rest = f", … ({len(names)} in all)" if len(names) > 100 else ""
    return f"({', '.join(map(repr, names[:100]))}{rest})"
