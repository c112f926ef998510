"""Write images in class folders as WebDataset shards: make_shards.py IMAGES SHARDS, for --data_set WDS.

IMAGES holds train/ and val/ with one folder for each class. SHARDS receives train-000000.tar, … and train-index.npz,
which says where each image is, and the same for val; images are copied byte for byte. Train from it with
--data_set WDS --data_path SHARDS.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import ClassFolders, write_shards


def main() -> int:
    """Run the command line; return 0, or 2 for folders that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("shards", type=Path, metavar="SHARDS")
    parser.add_argument("--images_per_shard", type=int, default=10_000, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        sources = {split: ClassFolders(arguments.images / split) for split in ("train", "val")}
        for split, source in sources.items():
            progress = partial(tqdm, desc=split, unit="images")
            shards = write_shards(source, arguments.shards, split, arguments.images_per_shard, progress)
            print(f"{split}: {len(source.targets)} images of {len(source.classes)} classes in {shards} shards")
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
