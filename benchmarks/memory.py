"""Measure the activation memory of a training step with and without checkpointing of the encoder.

python benchmarks/memory.py                              # resnet50, batch 4, 512x512
python benchmarks/memory.py --batch 2 --size 256 --arch unet

Saved: bytes of the distinct tensors that autograd keeps between forward and backward pass, without parameters. Peak: largest
number of bytes of live tensors during forward and backward pass, without parameters but with their gradients; on a GPU as
reported by the allocator.
"""

import argparse
import contextlib
import time
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcseg.networks import SegmentationNetwork


class SavedBytes:
    """Count the distinct storages that autograd saves, without those of the network's parameters and buffers."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
        # Keeping the tensors prevents their addresses from being reused
        self._saved: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the tensors that are saved in this context."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    @property
    def total(self) -> int:
        """Total size in bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._saved.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._own:
            self._saved[address] = tensor.detach()
        return tensor


class LiveBytes(TorchDispatchMode):
    """Track the bytes of all storages created by operators until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and record storages of its outputs that do not belong to its inputs."""
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs and storage not in self._known:
                    self._known.add(storage)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _free(self, size: int) -> None:
        self._now -= size


def saved_bytes(network: torch.nn.Module, image: Tensor) -> int:
    """Return the bytes that autograd keeps after a forward pass.

    Args:
        network: network to call with the image.
        image: (N,3,H,W), uint8 or floating point.
    """
    saved = SavedBytes(network)
    with saved.recording():
        network(image)
    return saved.total


def peak_bytes(network: torch.nn.Module, image: Tensor) -> tuple[int, float]:
    """Return the peak memory of forward and backward pass in bytes, and their time in seconds.

    Args:
        network: network to call with the image.
        image: (N,3,H,W), uint8 or floating point.
    """
    network.zero_grad(set_to_none=True)
    if image.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        network(image).float().mean().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start
    start = time.perf_counter()
    with LiveBytes() as live:
        network(image).float().mean().backward()
    return live.peak, time.perf_counter() - start


def main() -> None:
    """Print one row per architecture and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["unet", "deeplabv3plus"])
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    image = torch.randint(0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8, device=options.device)
    print(f"{options.encoder}, {options.batch} x 3 x {options.size} x {options.size}, float32, {options.device}")
    for arch in options.arch:
        results = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            network = SegmentationNetwork(arch, options.encoder, options.classes, checkpointing=checkpointing)
            network.to(options.device).train()
            saved = saved_bytes(network, image)
            peak, seconds = peak_bytes(network, image)
            results.append((saved, peak))
            name = f"{arch}{' checkpointed' if checkpointing else ''}"
            print(f"{name:28} saved {saved / 2**20:8.0f} MiB   peak {peak / 2**20:8.0f} MiB   {seconds:6.1f} s", flush=True)
        saved_ratio, peak_ratio = (after / before for before, after in zip(*results, strict=True))
        print(f"{arch:28} saved {cast(float, saved_ratio):8.1%}       peak {cast(float, peak_ratio):8.1%}", flush=True)


if __name__ == "__main__":
    main()
