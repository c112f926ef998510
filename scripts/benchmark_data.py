"""Compare the images per second and core of our training loader and of timm's create_loader, side by side.

Both read the same JPEGs, 500 by default, of ImageNet's usual size (500×375 pixels, about 90 kB), cut from the
photographs that come with scikit-learn, and augment them by the recipe of the ResNets. Neither uses workers, so that
the figures are those of one core, per second that it computes; the two take turns. Both hand on bytes from the
dataset's transform, and normalise and erase batch by batch on the training device, here the CPU, which is included.
timm's loader is as its train.py makes it by default: with the prefetcher.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader
from torch import Tensor
from tqdm import tqdm

from kernelwarehouse.datasets import Finish, build_dataset, build_train_loader
from kernelwarehouse.models import read_config

RECIPE = "resnet18/kw1x_resnet18"
BATCH = 50


def write_photographs(folder: Path, count: int) -> float:
    """Write JPEGs in two class folders under train/; return their mean size in bytes."""
    draw, sizes = random.Random(0), []
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in tqdm(range(count), desc="photographs", leave=False):
        photograph = draw.choice(photographs)
        width, height = (500, 375) if draw.random() < 0.7 else (320, 427)
        left, top = draw.randint(0, photograph.width - width), draw.randint(0, photograph.height - height)
        path = folder / "train" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + width, top + height)).save(path, quality=97)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def loaders(folder: Path) -> dict[str, Iterable[tuple[Tensor, Tensor]]]:
    """Our loader and timm's, of the same images by the same recipe."""
    fields = {"data_path": str(folder), "data_set": "IMNET", "nb_classes": 2, "batch_size": BATCH, "num_workers": 0}
    config = read_config(RECIPE, {**fields, "device": "cpu"})
    run = config.run
    timm_loader = create_loader(
        create_dataset("", folder, split="train"),
        input_size=(3, config.model.input_size, config.model.input_size),
        batch_size=BATCH,
        is_training=True,
        device=torch.device("cpu"),
        auto_augment=run.aa,
        re_prob=run.reprob,
        re_mode=run.remode,
        re_count=run.recount,
        interpolation=run.train_interpolation,
        num_workers=0,
        pin_memory=False,
        persistent_workers=False,
    )
    ours = build_train_loader(build_dataset(config, train=True), run, finish=Finish(config))
    return {"ours": ours, "timm": timm_loader}


def main() -> None:
    """Print the rates and their ratio, each as the median over the rounds and the range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # timm asks for 0 bits, at which the posterize of Pillow 13 raises: timm's loader would not finish.
    posterize = ImageOps.posterize
    ImageOps.posterize = lambda image, bits: posterize(image, max(bits, 1))
    rates: dict[str, list[float]] = {"ours": [], "timm": []}
    with tempfile.TemporaryDirectory() as folder:
        size = write_photographs(Path(folder), arguments.images)
        print(f"{arguments.images} photographs of {size / 1000:.0f} kB on average, {arguments.rounds} rounds")
        both = loaders(Path(folder))
        for _ in range(arguments.rounds):
            for name, loader in both.items():
                start = time.process_time()
                images = sum(len(targets) for _, targets in loader)
                rates[name].append(images / (time.process_time() - start))
    rates["ratio"] = [a / b for a, b in zip(rates["ours"], rates["timm"], strict=True)]
    for name, values in rates.items():
        digits, unit = (2, "") if name == "ratio" else (0, " images/s")
        low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
        print(f"{name:6}{middle}{unit}   ({low} to {high})")


if __name__ == "__main__":
    main()
