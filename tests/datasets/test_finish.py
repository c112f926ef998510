"""What is done to a whole batch of photographs on the training device."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms as T

from kernelwarehouse.datasets import (
    Digits,
    Erasable,
    Finish,
    begin_epoch,
    build_dataset,
    build_eval_loader,
    build_train_loader,
    eval_transform,
    viewable,
)
from kernelwarehouse.engine import World, evaluate_run, train_run
from kernelwarehouse.models import read_config

PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]
PLAIN = {"model": "resnet18", "data_set": "IMNET", "nb_classes": 2, "aa": None, "color_jitter": 0, "device": "cpu"}
EDGES = (3, 27, 5, 30)


def config(**fields):
    return read_config(PLAIN, fields)


def erasable(count=64, edges=EDGES):
    """Grey images, in each of which the same rectangle is to be erased, with a seed of its own."""
    rectangles = torch.tensor([[[*edges, 1000 + i], [0] * 5] for i in range(count)])
    return Erasable(torch.full((count, 3, 32, 32), 128, dtype=torch.uint8), rectangles)


def inside(images):
    return images[..., EDGES[0] : EDGES[1], EDGES[2] : EDGES[3]]


@pytest.mark.parametrize("by_imagenet", [True, False])
def test_bytes_are_normalised(by_imagenet):
    pixels = torch.randint(256, (4, 3, 16, 12), dtype=torch.uint8)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if by_imagenet else ((0.5,) * 3, (0.5,) * 3)
    expected = T.functional.normalize(pixels / 255, mean, std)
    finished = Finish(config(imagenet_default_mean_and_std=by_imagenet))(pixels)
    assert finished.is_contiguous()
    torch.testing.assert_close(finished, expected, atol=1e-6, rtol=0)


def test_floats_are_finished_already():
    images = torch.randn(2, 5, 8, 8)
    assert Finish(config())(images) is images


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_rectangle_is_filled_as_by_timm(mode):
    """With the mean, with normal noise for each colour, or for each pixel of each colour."""
    finish = Finish(config(remode=mode))
    untouched = finish(erasable().pixels)
    finished = finish(erasable())
    found = inside(finished).clone()
    inside(finished).copy_(inside(untouched))
    assert torch.equal(finished, untouched)
    if mode == "const":
        assert not found.any()
        return
    if mode == "rand":
        assert torch.equal(found, found[..., :1, :1].expand_as(found))
        found = found[..., :1, :1]
    assert len(found.unique()) > 0.99 * found.numel()  # no two images or colours have the same
    limit = 4 / found.numel() ** 0.5
    assert abs(found.mean()) < limit
    assert abs(found.std() - 1) < limit
    assert found.abs().max() > 2.5
    for axis in (0, 1, -1):
        neighbours = [found.narrow(axis, start, found.shape[axis] - 1).flatten() for start in (0, 1)]
        if found.shape[axis] > 1:
            assert abs(torch.corrcoef(torch.stack(neighbours))[0, 1]) < 4 / len(neighbours[0]) ** 0.5


def test_an_image_is_erased_alike_in_every_batch():
    finish, batch = Finish(config()), erasable(6)
    together = finish(batch)
    parts = [finish(Erasable(batch.pixels[part], batch.rectangles[part])) for part in (slice(4, 6), slice(4))]
    assert torch.equal(torch.cat(parts[::-1]), together)
    assert torch.equal(finish(Erasable(batch.pixels[3], batch.rectangles[3])), together[3])


def test_grey_is_the_average_of_the_normalised_and_erased_colours():
    colours, grey = (Finish(config(in_chans=channels))(erasable()) for channels in (3, 1))
    assert torch.equal(grey, colours.mean(1, keepdim=True))


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for i in range(12):
            path = tmp_path / split / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(256, size=(36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return tmp_path


def batches(folder, batches_done=0, rank=0, world_size=1, **fields):
    fields = {"data_path": str(folder), "input_size": 32, "batch_size": 3, "num_workers": 0, **fields}
    parts = config(reprob=0.7, recount=2, **fields)
    dataset = build_dataset(parts, train=True)
    loader = build_train_loader(dataset, parts.run, rank, world_size, Finish(parts))
    begin_epoch(loader, 1, batches_done)
    return torch.cat([images for images, _ in loader])


def test_erasing_knows_neither_workers_nor_interruptions_nor_processes(folder):
    expected = batches(folder)
    assert (expected.shape, expected.dtype) == ((12, 3, 32, 32), torch.float32)
    assert torch.equal(batches(folder, num_workers=2), expected)
    assert torch.equal(batches(folder, batches_done=2, num_workers=1), expected[6:])
    for rank in range(2):
        assert torch.equal(batches(folder, rank=rank, world_size=2), expected[rank::2])
    assert not torch.equal(batches(folder, seed=1), expected)


def test_evaluation_sees_what_the_whole_transform_makes(folder):
    parts = config(data_path=str(folder), input_size=32, batch_size=5, num_workers=1)
    dataset, transform = build_dataset(parts, train=False), eval_transform(parts)
    loader = build_eval_loader(dataset, parts.run, finish=Finish(parts))
    expected = [transform(Image.open(dataset.name(i))) for i in range(12)]
    assert torch.equal(torch.cat([images for images, _ in loader]), torch.stack(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_training_learns_to_tell_dark_photographs_from_bright_ones(tmp_path, channels):
    """Which takes the same normalisation in training and evaluation, within a training and after it."""
    for split in ("train", "val"):
        for i in range(32):
            path = tmp_path / split / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(127, size=(40, 40, 3)) + 128 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    fields = {"model_kwargs": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, "input_size": 32, "reprob": 0.25}
    fields |= {"in_chans": channels, "num_workers": 0, "batch_size": 8, "mixup": 0, "cutmix": 0, "smoothing": 0}
    fields |= {"epochs": 6, "warmup_epochs": 0, "lr": 0.2, "data_path": str(tmp_path)}
    output, world = tmp_path / "output", World(torch.device("cpu"))
    training = train_run(config(**fields, output_dir=str(output)), world)
    assert training.best["model"] == 100
    assert evaluate_run(config(**fields, resume=str(output / "checkpoint-best.pth")), world).acc1 == 100


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("by_imagenet", [True, False])
def test_a_normalised_image_can_be_viewed_again(channels, by_imagenet):
    fields = config(input_size=64, crop_pct=1.0, in_chans=channels, imagenet_default_mean_and_std=by_imagenet)
    seen = PHOTOGRAPHS[0].resize((64, 64))
    viewed = viewable(eval_transform(fields)(seen)[None], fields)[0]
    expected = T.functional.to_tensor(seen)
    if channels == 1:  # the statistics of the colours differ a little
        torch.testing.assert_close(viewed, expected.mean(0, keepdim=True), atol=0.02, rtol=0)
    else:
        torch.testing.assert_close(viewed, expected)


def test_digits_can_be_viewed_again_with_any_number_of_channels():
    stored = Digits(train=False)[0][0]
    for channels in (1, 2, 3, 5):
        fields = read_config(
            {"model": "resnet18", "data_set": "DIGITS", "nb_classes": 10, "input_size": 8, "in_chans": channels}
        )
        viewed = viewable(eval_transform(fields)(stored)[None], fields)[0]
        torch.testing.assert_close(viewed, stored.expand(3 if channels == 3 else 1, 8, 8), atol=1e-6, rtol=0)
