"""The embedded digits are split once and for all."""

from collections import Counter

import torch

from kernelwarehouse.datasets import Digits


def test_the_parts_hold_every_digit_once():
    train, held_out = Digits(train=True), Digits(train=False)
    assert (len(train), len(held_out)) == (1437, 360)
    together = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(together.unique(dim=0)) == 1797
    assert together.min() == 0
    assert together.max() == 1


def test_both_parts_hold_the_classes_in_equal_shares():
    shares = [{k: n / len(part) for k, n in Counter(part.targets).items()} for part in map(Digits, (True, False))]
    assert shares[0].keys() == shares[1].keys() == set(range(10))
    assert all(abs(shares[0][k] - shares[1][k]) < 0.003 for k in range(10))


def test_the_split_is_the_same_every_time():
    """Accuracies of different machines and years are comparable only on the same images."""
    held_out = Digits(train=False)
    assert torch.equal(held_out.images, Digits(train=False).images)
    assert held_out.targets[:10] == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]


def test_an_image_is_transformed():
    image, target = Digits(train=True, transform=lambda x: x + 1)[3]
    assert image.shape == (1, 8, 8)
    assert image.min() == 1
    assert target in range(10)
