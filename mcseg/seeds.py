"""Random numbers that are functions of the seed and of the place in a run, so that a run can go on where it stopped."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def seed_of(*parts: int | str) -> int:
    """Mix numbers and names to a seed of 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Let torch's generators, also of the GPUs among the devices, begin with a seed; afterwards they are as before."""
    gpus = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield
