"""The data set for detection: what COCO's own library reads is what was drawn."""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from kernelwarehouse.datasets.scenes import draw_scene, load_backgrounds, load_digits

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_scenes.py"
COUNTS = {"train": 4, "val": 3}
OPTIONS = ["--images", "4", "--val", "3", "--size", "96"]


def script():
    spec = importlib.util.spec_from_file_location("make_scenes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_scenes.py", *map(str, arguments)])
        return script().main()


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "new" / "out"
    assert make(out, *OPTIONS) == 0
    return out


@pytest.mark.parametrize("split", COUNTS)
def test_annotations_are_consistent(folder, split):
    file = folder / "annotations" / f"instances_{split}.json"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list("0123456789")
    assert len(coco.imgs) == COUNTS[split] == len(list((folder / split).iterdir()))
    raw = json.loads(file.read_text())
    assert len({a["id"] for a in raw["annotations"]}) == len(raw["annotations"]) == len(coco.anns)
    assert {a["image_id"] for a in raw["annotations"]} == set(coco.imgs)
    for image_id, image in coco.imgs.items():
        with Image.open(folder / split / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (96, 96)
        masks = []
        for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
            mask = coco.annToMask(annotation).astype(bool)
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            tight = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert annotation["bbox"] == tight
            assert annotation["area"] == mask.sum() > 0
            assert annotation["iscrowd"] == 0
            masks.append(mask)
        assert np.sum(masks, axis=0).max() == 1


@pytest.mark.parametrize("split", COUNTS)
def test_held_out_scenes_are_drawn_from_held_out_images(folder, split):
    """Each file is the scene that the images of its own split give."""
    train = split == "train"
    coco = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    for i, image in enumerate(coco["images"]):
        generator = np.random.default_rng((0, ("train", "val").index(split), i))
        scene = draw_scene(generator, load_digits(train), load_backgrounds(train), 96, 6)
        with Image.open(folder / split / image["file_name"]) as picture:
            assert np.abs(np.asarray(picture).astype(int) - scene.image).mean() < 3
        found = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert [a["category_id"] - 1 for a in found] == list(scene.targets)
        assert [a["area"] for a in found] == scene.masks.sum(axis=(1, 2)).tolist()


def test_the_same_seed_makes_the_same_files_and_more_scenes_begin_with_fewer(folder, tmp_path):
    expected = content(folder)
    (tmp_path / "again").mkdir()  # an empty folder may be there
    assert make(tmp_path / "again", *OPTIONS) == 0
    assert content(tmp_path / "again") == expected
    assert make(tmp_path / "other", *OPTIONS, "--seed", "1", "--images", "5") == 0
    assert make(tmp_path / "more", *OPTIONS, "--images", "5") == 0
    other, more = content(tmp_path / "other"), content(tmp_path / "more")
    pictures = [path for path in expected if path.suffix == ".jpg"]
    assert len(pictures) == 7
    assert all(more[path] == expected[path] != other[path] for path in pictures)
    assert len(more) == len(expected) + 1


def test_nothing_is_written_over(folder, capsys):
    before = content(folder)
    assert make(folder, *OPTIONS) == 2
    output = capsys.readouterr()
    assert output.err == f"error: {folder} is there already and not an empty folder; delete it, or name another\n"
    assert content(folder) == before


def test_an_interrupted_writing_leaves_nothing_that_could_be_taken_for_whole(tmp_path, monkeypatch):
    """Neither when it can tidy up, nor when it is killed while it writes the last scenes."""
    module, out, written = script(), tmp_path / "out", []

    def interrupt(*arguments):
        if len(written) == 6:
            assert list(tmp_path.rglob("*.jpg"))
            assert not out.exists()
            raise KeyboardInterrupt
        written.append(draw_scene(*arguments))
        return written[-1]

    monkeypatch.setattr(module, "draw_scene", interrupt)
    monkeypatch.setattr(sys, "argv", ["make_scenes.py", str(out), *OPTIONS])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert len(written) == 6
    assert not list(tmp_path.iterdir())
    assert make(out, *OPTIONS) == 0
    assert list(tmp_path.iterdir()) == [out]


ERRORS = {
    "--images 0": "--images 0: at least 1 is needed",
    "--val -3": "--val -3: at least 1 is needed",
    "--max_objects 0": "--max_objects 0: at least 1 is needed",
    "--seed -1": "--seed -1: at least 0 is needed",
    "--size 32": "--size 32: between 64 and 427 pixels are possible",
    "--source fashion-mnist": "--source fashion-mnist is read from a folder; pass --root FOLDER",
    "--root x": "--root is for --source fashion-mnist; the digits need none",
    "--source fashion-mnist --root nowhere": "nowhere does not hold the files of Fashion-MNIST",
}


@pytest.mark.parametrize("options", ERRORS)
def test_options_that_cannot_be_used_are_refused_in_one_line(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert make("out", *options.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {ERRORS[options]}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert make(tmp_path / "file" / "out") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_it_says_what_it_made(tmp_path, capsys):
    assert make(tmp_path / "out", *OPTIONS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["train:", "4", "scenes"], ["val:", "3", "scenes"]]
