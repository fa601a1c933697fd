"""Tiles of logits on the CPU, several at a time: one thread runs all operations on a tile.

PyTorch distributes each operation over all threads, which wait for each other when it ends. On tiles that fit into a cache
the wait takes as long as the operation. Threads that work on different tiles do not wait.
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
    """Cut logits into tiles of about ``size`` elements: rows of one sample, or several whole samples if these are small.

    The number of tiles is a multiple of the number of threads if the number of rows allows it.

    Args:
        logits: ``(N, C, height, *rest)``.
        size: Largest number of elements of a tile, unless a single row has more.

    Yields:
        Slices of the samples and of the rows; the first tile is the largest.
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
    """Call a function on parts, without gradients: in several threads with a share of the parts each, or once with all.

    With several threads, each operation of the function runs in one thread. Without parts the function is not called.
    """
    threads = min(torch.get_num_threads(), len(parts)) if len(parts) > 1 else 1
    if threads == 1:
        if parts:
            function(parts)
        return
    inference = torch.is_inference_mode_enabled()

    def work(thread: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # a new thread does not inherit these modes
            function(parts[thread::threads])

    for _ in _pool(torch.get_num_threads(), os.getpid()).map(work, range(threads)):
        pass  # the iteration raises the exceptions of the threads


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Start threads that run each operation in a single thread; one pool per process, because a fork copies no threads."""
    barrier = threading.Barrier(threads)

    def limit_to_one_thread() -> None:
        torch.get_num_threads()  # sets the thread's number to the process's default, which would otherwise happen later
        torch.set_num_threads(1)
        barrier.wait()  # all threads must exist before the process's number is restored

    pool = ThreadPoolExecutor(threads, "mcseg-tiles", limit_to_one_thread)
    for future in [pool.submit(barrier.wait) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(threads)  # set_num_threads(1) also changed the default of threads that start later
    return pool
