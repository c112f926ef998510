"""Where processes meet before they talk: a store of their own, in which no earlier attempt has left anything.

torchrun keeps one store for all its restarts. There torch finds the addresses of processes that were killed, and waits
for them or fails (pytorch/pytorch#135712). Its count of restarts is no remedy, since each machine counts its own.
"""

import time
from uuid import uuid4

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] - documented there
from torch.distributed.rendezvous import rendezvous


def meet(url: str, rank: int, size: int) -> Store:
    """Return an empty store that exactly these `size` processes share.

    Args:
        url: Where the common store is, as torch's init_method.
        rank: This process's number, from 0.
        size: Number of processes.

    Raises:
        RuntimeError, ValueError: There is no such place, or not all processes come there in time.
    """
    store, _, _ = next(rendezvous(url, rank, size))
    return PrefixStore(agree(store, rank, size), store)


def agree(store: Store, rank: int, size: int) -> str:
    """Return a word that these processes share, and no others that ever used `store`.

    Each asks under a new name, which nobody but a living process 0 answers. That one takes no question for a sign of
    life, only the thanks for its own answer.
    """
    name = uuid4().hex
    if rank > 0:
        store.set(f"question/{rank}", name)
        word = store.get(f"answer/{name}").decode()
        store.set(f"thanks/{word}/{rank}", "")
        return word
    end = time.monotonic() + store.timeout.total_seconds()  # pyright: ignore[reportAttributeAccessIssue] - not in the stub
    for other in range(1, size):
        while not store.check([f"thanks/{name}/{other}"]):
            store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
            if time.monotonic() > end:
                raise RuntimeError(f"process {other} of {size} did not come in time")
            time.sleep(0.01)
    return name
