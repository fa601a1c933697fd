"""Tiles of logits on the CPU, several at a time: one thread computes all operations on a tile.

PyTorch spreads each operation over all threads, which wait for each other at its end. On tiles that fit into a cache the
waiting takes as long as the operation. Threads that have a tile each do not wait.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def tiles(logits: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut into rows of one sample, or runs of whole samples where these are small, of about ``size`` elements.

    Each thread gets as many tiles as the others, where the rows allow.
    """
    num, num_classes, height, *rest = logits.shape
    if logits.numel() == 0:
        return
    row = num_classes * torch.Size(rest).numel()
    rows = max(1, min(height, size // row))
    samples = max(1, size // (row * height))
    if samples == 1 and rows < height:
        parts = -(-height // rows)
        while parts < height and num * parts % torch.get_num_threads():
            parts += 1
        rows = -(-height // parts)
    for n in range(0, num, samples):
        for r in range(0, height, rows):
            yield slice(n, n + samples), slice(r, r + rows)


def on_threads(function: Callable[[Sequence[Part]], None], parts: Sequence[Part]) -> None:
    """Call a function, without gradients: once with all parts, or in several threads with some of them each.

    Where there are several threads, an operation of the function runs in one of them. Without parts nothing is called.
    """
    threads = min(torch.get_num_threads(), len(parts)) if len(parts) > 1 else 1
    if threads == 1:
        if parts:
            function(parts)
        return
    inference = torch.is_inference_mode_enabled()

    def some(first: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # these modes are a thread's own
            function(parts[first::threads])

    for _ in _pool(torch.get_num_threads(), os.getpid()).map(some, range(threads)):
        pass  # raises what a thread has raised


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose operations stay in them; a forked process needs its own, as threads are not forked."""
    barrier = threading.Barrier(threads)

    def begin() -> None:
        torch.get_num_threads()  # which makes a new thread take the process's number over: from now on it has its own
        torch.set_num_threads(1)
        barrier.wait()  # until all are there

    pool = ThreadPoolExecutor(threads, "mcseg-tiles", begin)
    for future in [pool.submit(barrier.wait) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(threads)  # for threads that begin later: it was changed for them as well
    return pool
