import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelwarehouse.models.ops.kernel_warehouse import Partition, assign, count_cells, share_cells

layers = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@given(layers, st.data())
def test_every_cell_belongs_to_one_layer_and_every_layer_has_one(mixtures, data):
    cells = data.draw(st.integers(len(mixtures), 4 * sum(mixtures)))
    shares = share_cells(mixtures, cells)
    assert sum(shares) == cells
    assert min(shares) >= 1
    if cells >= sum(mixtures):
        assert all(s >= m for s, m in zip(shares, mixtures, strict=True))
    else:
        assert all(s <= m for s, m in zip(shares, mixtures, strict=True))


@given(st.integers(1, 60), st.integers(1, 240), st.integers(0, 50))
def test_assigned_cells_are_distinct_ordered_and_as_many_as_possible(mixtures, cells, start):
    held = assign(mixtures, min(cells, 4 * mixtures), start)
    own = min(cells, 4 * mixtures)
    assigned = [cell for cell in held if cell is not None]
    assert len(held) == mixtures
    assert assigned == sorted(set(assigned))
    assert len(assigned) == min(own, mixtures)
    assert all(start <= cell < start + own for cell in assigned)


@given(layers, st.integers(1, 8))
def test_whole_budgets_follow_the_paper(mixtures, budget):
    shares = share_cells(mixtures, count_cells(sum(mixtures), budget))
    assert shares == [m * budget for m in mixtures]
    assert assign(mixtures[0], shares[0], 5) == [5 + i * budget for i in range(mixtures[0])]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(2, 8))
def test_unit_fractions_follow_the_paper(cells, q):
    mixtures = [q * c for c in cells]
    assert share_cells(mixtures, count_cells(sum(mixtures), 1 / q)) == cells
    held = assign(mixtures[0], cells[0], 0)
    expected = [i % q == (i // q) % q for i in range(mixtures[0])]
    assert [cell is not None for cell in held] == expected


def test_fractional_budgets_by_hand():
    assert share_cells([9, 9, 18, 2], 28) == [7, 7, 13, 1]
    assert assign(4, 3, 10) == [10, None, 11, 12]
    assert assign(2, 3, 0) == [0, 1]
    assert assign(4, 6, 0) == [0, 1, 3, 4]


def test_too_few_cells():
    with pytest.raises(ValueError, match="2 cells cannot be shared by 3 layers"):
        share_cells([5, 5, 5], 2)


@pytest.mark.parametrize(("total", "ratio", "cells"), [(100, 0.29, 29), (57, 1 / 3, 19), (3, 0.1, 1), (47, 0.5, 23)])
def test_count_cells(total, ratio, cells):
    assert count_cells(total, ratio) == cells


def test_partition_counts_and_refuses():
    partition = Partition((8, 6, 3, 2), (4, 2, 1, 1))
    assert partition.grid == (3, 2, 2, 3)
    assert partition.mixtures == math.prod((3, 2, 2, 3))
    for kernel, cell in (((8, 6, 3), (3, 2, 1)), ((8, 6, 3), (4, 2)), ((8, 0, 3), (4, 2, 1))):
        with pytest.raises(ValueError, match=r"divide|dimensions|positive"):
            Partition(kernel, cell)
