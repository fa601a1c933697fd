"""Seeds derived from the run's seed and the position in the run, so that a resumed run draws the same random numbers."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def seed_of(*parts: int | str) -> int:
    """Hash numbers and names to a seed in [0, 2**63); the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Seed torch's random number generators inside a ``with`` block and restore their state after it.

    Args:
        seed: seed of the CPU generator and, if ``devices`` holds a GPU, of the generators of all GPUs.
        *devices: devices used in the block; the state of each GPU among them is restored as well.
    """
    gpus = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield
