"""What happens to an image on its way to the network."""

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ImageOps import posterize
from sklearn.datasets import load_sample_images
from timm.data import auto_augment, create_transform, random_erasing
from timm.utils import random_seed
from torchvision import transforms as T

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.datasets import Digits, Finish, build_dataset, eval_transform, train_transform, transforms
from kernelwarehouse.datasets.finish import statistics
from kernelwarehouse.models import read_config

DRAWS = 10_000
MARK = 99.0
PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]
PLAIN = {"model": "resnet18", "data_set": "IMNET", "aa": None, "color_jitter": 0, "reprob": 0}


@pytest.fixture
def photograph():
    generator = torch.Generator().manual_seed(0)
    return T.functional.to_pil_image(torch.rand(3, 90, 120, generator=generator))


def config(**fields):
    return read_config(PLAIN, fields)


def steps(transform):
    """The names of all transforms inside, in order."""
    inner = transform.transforms if isinstance(transform, T.Compose) else None
    return [type(transform).__name__] if inner is None else [name for t in inner for name in steps(t)]


@pytest.mark.parametrize("data_set", ["IMNET", "CIFAR10"])
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 48)])
@pytest.mark.parametrize("make", [train_transform, eval_transform])
def test_every_image_gets_the_shape_that_the_network_takes(photograph, make, channels, size, data_set):
    transform = make(config(in_chans=channels, input_size=size, data_set=data_set, aa="rand-m9-mstd0.5-inc1"))
    for image in (photograph, photograph.convert("L"), photograph.convert("RGBA")):
        assert transform(image).shape == (channels, size, size)


def test_photographs_take_one_or_three_channels():
    with pytest.raises(ConfigError, match="'in_chans'"):
        eval_transform(config(in_chans=4))


def test_evaluation_resizes_to_256_and_crops_224(photograph):
    transform = eval_transform(config(imagenet_default_mean_and_std=False))
    resized = photograph.resize((341, 256), Image.Resampling.BICUBIC)
    expected = T.functional.to_tensor(T.functional.center_crop(resized, 224)) * 2 - 1
    torch.testing.assert_close(transform(photograph), expected, atol=1e-6, rtol=0)


def test_evaluation_from_384_pixels_keeps_the_whole_image(photograph):
    transform = eval_transform(config(input_size=384, imagenet_default_mean_and_std=False))
    expected = T.functional.to_tensor(photograph.resize((384, 384), Image.Resampling.BICUBIC)) * 2 - 1
    torch.testing.assert_close(transform(photograph), expected, atol=1e-6, rtol=0)


def test_a_given_crop_pct_wins(photograph):
    transform = eval_transform(config(input_size=60, crop_pct=0.5, imagenet_default_mean_and_std=False))
    resized = photograph.resize((160, 120), Image.Resampling.BICUBIC)
    expected = T.functional.to_tensor(T.functional.center_crop(resized, 60)) * 2 - 1
    torch.testing.assert_close(transform(photograph), expected, atol=1e-6, rtol=0)


def test_thumbnails_are_evaluated_whole(photograph):
    thumbnail = photograph.resize((32, 32))
    transform = eval_transform(config(data_set="CIFAR10", input_size=32, imagenet_default_mean_and_std=False))
    torch.testing.assert_close(transform(thumbnail), T.functional.to_tensor(thumbnail) * 2 - 1, atol=1e-6, rtol=0)


def test_normalisation_is_by_imagenet_unless_told_otherwise():
    grey = Image.new("RGB", (224, 224), (128, 128, 128))
    default = eval_transform(config())(grey)[:, 0, 0]
    torch.testing.assert_close(
        default, (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )
    assert eval_transform(config(imagenet_default_mean_and_std=False))(grey)[0, 0, 0] == pytest.approx(
        256 / 255 - 1, abs=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "present", "absent"),
    [
        ({}, "RandomResizedCrop RandomHorizontalFlip", "RandAugment ColorJitter RandomErasing"),
        ({"aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4}, "RandAugment", "ColorJitter"),
        ({"aa": "original"}, "AutoAugment", "RandAugment"),
        ({"aa": "augmix-m3-w3"}, "AugMixAugment", "RandAugment"),
        ({"color_jitter": 0.4}, "ColorJitter", "RandAugment"),
        ({"reprob": 0.25}, "RandomErasing", "RandAugment"),
        (
            {"traditional_preprocess": True, "aa": "original", "color_jitter": 0.4, "reprob": 0.5},
            "RandomResizedCrop RandomHorizontalFlip",
            "AutoAugment ColorJitter RandomErasing",
        ),
        ({"data_set": "CIFAR10"}, "RandomCrop RandomHorizontalFlip", "RandomResizedCrop"),
        ({"data_set": "DIGITS"}, "RandomAffine", "RandomHorizontalFlip RandomResizedCrop"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "plain" if isinstance(value, dict) else "",
)
def test_each_field_brings_its_augmentation(fields, present, absent):
    names = set(steps(train_transform(config(**fields))))
    assert names >= set(present.split())
    assert not names & set(absent.split())


@pytest.mark.parametrize(
    "fields",
    [
        {"traditional_preprocess": True, "train_interpolation": "random"},
        {"color_jitter": 0.4, "reprob": 0.25},
        {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "imagenet_default_mean_and_std": False},
    ],
    ids=["traditional", "jitter", "randaugment"],
)
def test_photographs_are_augmented_as_by_timm(fields, monkeypatch):
    """From one random state both draw the same crop, flip and operations, and arrive at the same image.

    torch's filter rounds other values than Pillow's, by one of 255 levels; a few operations amplify that. What is
    erased is marked, because the noise in it is drawn at another time.
    """
    monkeypatch.setattr(random_erasing, "_get_pixels", lambda *_, **__: torch.tensor(MARK))
    monkeypatch.setattr(Finish, "_fill", lambda self, rectangle, seed: rectangle.fill_(MARK))
    monkeypatch.setattr(auto_augment.ImageOps, "posterize", lambda image, bits: posterize(image, max(bits, 1)))
    run = config(**fields).run
    plain = run.traditional_preprocess
    ours = train_transform(config(**fields))
    theirs = create_transform(
        224,
        is_training=True,
        auto_augment=run.aa,
        color_jitter=run.color_jitter or None,
        interpolation=run.train_interpolation,
        re_prob=0 if plain else run.reprob,
        re_mode="pixel",
        **statistics(run)._asdict(),
    )
    errors, erased = [], 0
    for seed, photograph in enumerate(PHOTOGRAPHS * 60):
        random_seed(seed)
        expected = theirs(photograph)
        erased += (expected == MARK).any().item()
        random_seed(seed)
        errors.append((ours(photograph) - expected).abs().mean().item())
    level = 1 / 255 / 0.225
    assert np.median(errors) < 0.2 * level
    assert np.mean(errors) < 0.5 * level
    assert max(errors) < 20 * level
    assert (erased > 0) == (run.reprob > 0 and not plain)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("data_set", ["IMNET", "DIGITS"])
def test_erasing_erases_as_often_as_it_is_told(data_set, mode):
    black = Image.new("RGB", (64, 64)) if data_set == "IMNET" else torch.zeros(1, 8, 8)
    plain = {"data_set": data_set, "input_size": 32, "reprob": 0}
    untouched = eval_transform(config(**plain))(black)
    transform = train_transform(config(**plain | {"reprob": 0.5, "remode": mode, "recount": 2}))
    random_seed(0)
    erased = sum(not torch.allclose(transform(black), untouched, atol=1e-5) for _ in range(200))
    assert 70 < erased < 130


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "v0", "augmix-m9-mstd0.5"])
def test_policies_survive_the_posterize_of_every_pillow(policy):
    """At 0 bits, which timm draws at magnitude 10, the posterize of Pillow 13 raises."""
    transform = train_transform(config(aa=policy, input_size=16))
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    random_seed(0)
    for _ in range(DRAWS):
        transform(image)


def test_zero_bits_were_among_the_draws_and_are_black(monkeypatch):
    """Black is what Pillow made of 0 bits before version 13."""
    bits = []
    inner = transforms._posterize
    monkeypatch.setattr(transforms, "_posterize", lambda image, n, **k: (bits.append(n), inner(image, n, **k))[1])
    transform = train_transform(config(aa="rand-m9-mstd0.5-inc1", input_size=16))
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    random_seed(0)
    for _ in range(DRAWS):
        transform(image)
    assert set(bits) >= {0, 1}
    assert inner(image, 0).getextrema() == ((0, 0),) * 3
    assert inner(image, 1).getpixel((0, 0)) == (128, 0, 0)


def test_an_unknown_policy_is_named():
    with pytest.raises(ConfigError, match=r"'aa'.*'rnad-m9'"):
        train_transform(config(aa="rnad-m9"))


def test_digits_fill_the_input_size_and_the_channels():
    fields = {"model": "resnet18", "nb_classes": 10, "input_size": 32, "reprob": 0, "in_chans": 3}
    image, _ = build_dataset(read_config(fields), train=False)[0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[0], image[1])
    stored = Digits(train=False)[0][0]
    restored = T.functional.resize(image[:1], 8) * 0.376 + 0.305
    assert (restored - stored).abs().mean() < 0.12  # blurred, and no other digit
    varied = build_dataset(read_config(fields), train=True)
    assert not torch.equal(varied[0][0], varied[0][0])
