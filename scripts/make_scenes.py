"""Make a COCO-format data set that needs no download, to train and measure detection anywhere: make_scenes.py OUT.

Handwritten digits (or the garments of Fashion-MNIST, when its folder is given) lie over photographs, scaled, rotated,
coloured, and partly over each other. OUT receives train/, val/, annotations/instances_train.json and
instances_val.json with exact masks. Held-out scenes show other digits on other regions of the photographs. With the
same libraries the same options make the same files. Train on it by detection/configs/quickstart.py.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets.scenes import Cutouts, Scene, draw_scene, load_backgrounds, load_digits, load_fashion

SPLITS = ("train", "val")
# Below it a digit is a few pixels; above it the photographs, 427 pixels high, would be enlarged.
SIZES = range(64, 428)


def write_split(
    folder: Path, split: str, cutouts: Cutouts, count: int, size: int, max_objects: int, seed: int
) -> list[int]:
    """Write the pictures and annotations of one split into `folder`; return the number of objects in each scene."""
    backgrounds, (pictures, file) = load_backgrounds(split == "train"), paths(folder, split)
    pictures.mkdir(parents=True)
    images, annotations, objects = [], [], []
    for i in tqdm(range(count), desc=split, unit="scenes"):
        # A generator for each scene: a larger data set of the same seed begins with the smaller one.
        generator = np.random.default_rng((seed, SPLITS.index(split), i))
        scene = draw_scene(generator, cutouts, backgrounds, size, max_objects)
        name = f"{i:06d}.jpg"
        Image.fromarray(scene.image).save(pictures / name, quality=95, subsampling=0)
        images.append({"id": i + 1, "file_name": name, "height": size, "width": size})
        annotations += describe(scene, i + 1, first_id=len(annotations) + 1)
        objects.append(len(scene.targets))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(cutouts.classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return objects


def paths(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the folder of a split's pictures and the file of its annotations."""
    return folder / split, folder / "annotations" / f"instances_{split}.json"


def describe(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    """Return COCO's annotation of each object; the box is (left, top, width, height) in pixels."""
    annotations = []
    for number, (mask, target) in enumerate(zip(scene.masks, scene.targets, strict=True)):
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotations.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": target + 1,
                "bbox": rle.toBbox(code).tolist(),
                "area": int(rle.area(code)),
                "iscrowd": 0,
                "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
            }
        )
    return annotations


def make(arguments: argparse.Namespace) -> None:
    """Write both splits aside and move them into place when they are whole.

    Raises:
        ConfigError: An option that makes no sense, no Fashion-MNIST where it should be, or a folder that is not empty.
        OSError: A folder that cannot be written.
    """
    counts, out = {"train": arguments.images, "val": arguments.val}, arguments.out
    for option in ("images", "val", "max_objects"):
        if getattr(arguments, option) < 1:
            raise ConfigError(f"--{option} {getattr(arguments, option)}: at least 1 is needed")
    if arguments.seed < 0:
        raise ConfigError(f"--seed {arguments.seed}: at least 0 is needed")
    if arguments.size not in SIZES:
        raise ConfigError(f"--size {arguments.size}: between {SIZES[0]} and {SIZES[-1]} pixels are possible")
    fashion = arguments.source == "fashion-mnist"
    if fashion != (arguments.root is not None):
        raise ConfigError(
            "--source fashion-mnist is read from a folder; pass --root FOLDER"
            if fashion
            else "--root is for --source fashion-mnist; the digits need none"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not an empty folder; delete it, or name another")
    cutouts = [load_fashion(s == "train", arguments.root) if fashion else load_digits(s == "train") for s in SPLITS]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        whole = Path(aside) / out.name
        for split, source in zip(SPLITS, cutouts, strict=True):
            options = (arguments.size, arguments.max_objects, arguments.seed)
            objects = write_split(whole, split, source, counts[split], *options)
            print(f"{split}: {len(objects)} scenes with {sum(objects)} objects of {len(source.classes)} classes")
        whole.replace(out)


def main() -> int:
    """Run the command line; return 0, or 2 for folders and options that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    add = parser.add_argument
    add("--images", type=int, default=1000, metavar="N", help="scenes for training; default: %(default)s")
    add("--val", type=int, default=200, metavar="N", help="held-out scenes; default: %(default)s")
    add("--size", type=int, default=160, metavar="PIXELS", help="side of a scene; default: %(default)s")
    add("--max_objects", type=int, default=6, metavar="N", help="the most objects in a scene; default: %(default)s")
    add("--source", default="digits", choices=("digits", "fashion-mnist"), help="default: %(default)s")
    add("--root", type=Path, metavar="FOLDER", help="where torchvision keeps Fashion-MNIST")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    try:
        make(parser.parse_args())
    except (ConfigError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
