"""What an evaluation shows beside its three figures: tables of classes and images, and the confusion matrix."""

import csv
from pathlib import Path
from typing import Any

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from ..configs.schema import RunConfig
from ..datasets import Photographs, Relabelled, SeededDataset
from .distributed import World
from .evaluate import Predictions
from .log import RunLog
from .outputs import report

# Up to so many classes, the matrix shows their names and counts.
READABLE = 20


def write_reports(run: RunConfig, dataset: Any, predictions: Predictions) -> None:
    """Write the files that `run` names in per_class, confusion and predictions, where it names any.

    An image with several acceptable classes counts as one of the first; one without any counts only in predictions.

    Raises:
        SaveError: One of them cannot be written.
    """
    truth = predictions.labels[:, 0]
    if run.per_class:
        with report(run.per_class) as path:
            _write_classes(path, dataset.classes, truth, predictions.classes)
    if run.confusion:
        counts = confusion_matrix(truth, predictions.classes[:, 0], len(dataset.classes))
        with report(run.confusion) as path:
            kind = Path(run.confusion).suffix.removeprefix(".").lower()
            draw_confusion(counts, dataset.classes).savefig(path, format=kind, dpi=150)
    if run.predictions:
        with report(run.predictions) as path:
            _write_images(path, dataset, predictions)


def say_corrupt(dataset: Any, world: World, log: RunLog) -> None:
    """List the images that any process had to pass over."""
    images = _images(dataset)
    if isinstance(images, Photographs) and images.skip_corrupt:
        for index in world.reduce(images.corrupt.int().to(world.device)).nonzero().flatten().tolist():
            log.say(f"passed over, since it cannot be read: {images.name(index)}")


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count images by class (row) and predicted class (column): (N,), (N,) → (classes, classes)."""
    labelled = truth >= 0
    pairs = truth[labelled] * classes + predicted[labelled]
    return pairs.bincount(minlength=classes * classes).view(classes, classes)


def draw_confusion(counts: Tensor, classes: tuple[str, ...]) -> Figure:
    """Draw a confusion matrix as shares of each row, and beside it the classes most often taken for another."""
    size, shares = len(counts), counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    matrix, text = figure.subplots(1, 2, width_ratios=(2.4, 1))
    # The root lets a rare confusion be seen; without interpolation a single cell of 1000 would fall between pixels.
    drawn = matrix.imshow(shares, cmap="magma_r", norm=PowerNorm(0.5, 0, 1), interpolation="antialiased")
    figure.colorbar(drawn, ax=matrix, label="share of the class's images", shrink=0.8)
    accuracy = 100 * counts.trace().item() / max(counts.sum().item(), 1)
    matrix.set(title=f"confusion matrix, top-1 {accuracy:.2f} %", xlabel="predicted class", ylabel="class")
    if size <= READABLE:
        matrix.set_xticks(range(size), classes, rotation=45, ha="right")
        matrix.set_yticks(range(size), classes)
        for row, column in counts.nonzero().tolist():
            color = "white" if shares[row, column] > 0.35 else "black"
            count = counts[row, column].item()
            matrix.text(column, row, count, ha="center", va="center", color=color, fontsize=9)
    wrong = counts.clone().fill_diagonal_(0).flatten()
    lines = []
    for place in wrong.argsort(descending=True, stable=True)[:25].tolist():
        if wrong[place]:
            row, column = divmod(place, size)
            lines.append(f"{wrong[place].item():>5}  {_short(classes[row])} → {_short(classes[column])}")
    text.axis("off")
    text.set_title("most frequent confusions: images, class → taken for", loc="left")
    text.text(0, 0.99, "\n".join(lines) or "none", va="top", family="monospace", fontsize=9, transform=text.transAxes)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _write_classes(path: Path, names: tuple[str, ...], truth: Tensor, top: Tensor) -> None:
    hits = top == truth[:, None]
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["class", "name", "images", "acc1", "acc5"])
        for number, name in enumerate(names):
            mine = hits[truth == number]
            acc = [f"{100 * h.float().mean().item():.3f}" if len(mine) else "" for h in (mine[:, 0], mine.any(dim=1))]
            writer.writerow([number, name, len(mine), *acc])


def _write_images(path: Path, dataset: Any, predictions: Predictions) -> None:
    images = _images(dataset)
    top = predictions.classes.shape[1]
    columns = [f"{what}{i + 1}" for i in range(top) for what in ("class", "probability")]
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["image", "target", *columns])
        for index, labels in enumerate(predictions.labels.tolist()):
            name = images.name(index) if isinstance(images, Photographs) else index
            pairs = zip(predictions.classes[index].tolist(), predictions.probabilities[index].tolist(), strict=True)
            target = " ".join(str(label) for label in labels if label >= 0)
            writer.writerow([name, target, *(v for c, p in pairs for v in (c, f"{p:.6f}"))])


def _images(dataset: Any) -> Any:
    return dataset.dataset if isinstance(dataset, Relabelled | SeededDataset) else dataset
