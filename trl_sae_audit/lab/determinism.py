"""Randomness that is seeded inside and undisturbed outside."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, threads: int) -> Iterator[None]:
    """Run a block with all global generators seeded and a fixed number of CPU threads; restore both after it.

    The number of threads matters: it decides the order in which sums are added up, hence their last bits.
    """
    python_state, numpy_state, before = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
