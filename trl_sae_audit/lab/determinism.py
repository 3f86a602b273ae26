"""Randomness that is seeded inside a block and unchanged outside it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolate_randomness(seed: int, threads: int) -> Iterator[None]:
    """Run a block with all global generators seeded and a fixed number of CPU threads; restore both afterwards.

    The number of threads decides the order in which sums are added up, and so their last bits.
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
