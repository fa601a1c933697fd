"""Recomputed activations: the blocks of an encoder store only their inputs for the backward pass."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(encoder: nn.Module, name: str) -> None:
    """Make each block of an encoder store only its input for the backward pass.

    timm's ``set_grad_checkpointing`` would update the batch-norm statistics twice.
    """
    blocks = _find_blocks(encoder)
    if not blocks:
        raise ValueError(f"checkpointing: the encoder {name} is not made of blocks; set checkpointing to false")
    for block in blocks:
        # set on the instance, which keeps the names in the state_dict; a partial is copied and pickled with its block
        block.forward = functools.partial(_run_checkpointed, block)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _find_blocks(module: nn.Module) -> list[nn.Module]:
    """Find the blocks of a module: submodules made of layers that are neither containers nor stages of blocks."""
    blocks: list[nn.Module] = []
    for child in module.children():
        if not _has_layers(child):
            continue
        if isinstance(child, _CONTAINERS) or _has_repeated_blocks(child):
            blocks += _find_blocks(child)
        else:
            blocks.append(child)
    return blocks


def _has_layers(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _has_repeated_blocks(module: nn.Module) -> bool:
    for container in module.modules():
        if isinstance(container, _CONTAINERS):
            types = Counter(type(c) for c in container.children() if _has_layers(c) and not isinstance(c, _CONTAINERS))
            if any(count > 1 for count in types.values()):
                return True
    return False


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile does not support context_fn
def _run_checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block's forward and store only its arguments for the backward pass."""
    forward = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # DenseNet appends to the list of features that it passes to its layers; the second run needs the original list
    arguments = [list(value) if isinstance(value, list) else value for value in args]
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _preserve_statistics(block)),
        **kwargs,
    )


@contextlib.contextmanager
def _preserve_statistics(block: nn.Module) -> Iterator[None]:
    """Make norms in training mode update copies of their running statistics, and discard the copies."""
    norms = [module for module in block.modules() if module.training and getattr(module, "track_running_stats", False)]
    originals = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    try:
        for norm, buffers in zip(norms, originals, strict=True):
            # copies, not None: the second run must save as many tensors, of the same shapes, as the first
            for name, value in buffers.items():
                setattr(norm, name, value.clone())
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)
