"""Processes agree on a place of their own, whatever earlier attempts have left in their store."""

import random
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from kernelwarehouse.engine.rendezvous import agree


def attempt(store, ranks, size):
    """What each of these ranks of an attempt finds."""
    found = {}

    def come(rank, delay):
        time.sleep(delay)
        try:
            found[rank] = agree(store, rank, size)
        except RuntimeError as e:
            found[rank] = str(e)

    threads = [threading.Thread(target=come, args=(rank, random.uniform(0, 0.03))) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    return [found[rank] for rank in ranks]


def test_each_attempt_agrees_on_a_word_of_its_own():
    store, words = HashStore(), set()
    for _ in range(20):
        (word,) = set(attempt(store, range(4), 4))
        words.add(word)
    assert len(words) == 20


@pytest.mark.parametrize("came", [[0], [0, 1], [1], [1, 2]])
def test_an_attempt_in_which_not_all_came_leaves_nothing_that_confuses_the_next(came):
    store = HashStore()
    attempt(store, range(3), 3)
    store.set_timeout(timedelta(seconds=0.2))
    assert any("time" in message for message in attempt(store, came, 3))
    store.set_timeout(timedelta(seconds=30))
    assert len(set(attempt(store, range(3), 3))) == 1
