"""The calibrated log-loss per pixel, implemented several ways behind one function.

At a pixel with logits ``z`` (one per class), label ``y`` and class margins ``s_k = z_k - max_{j != k} z_j``::

    loss = [ foreground_weight * softplus(foreground_y - s_y) + sum_{k != y} softplus(background_k + s_k) ] / C

Implementations agree on value, gradient and tie-breaking: of several largest logits the lowest index counts as the
largest, and the lowest of the remaining ones as its runner-up.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .fused import fused_pixel_loss
from .reference import reference_pixel_loss

PixelLoss = Callable[[Tensor, Tensor, Tensor, Tensor, float, int], Tensor]

BACKENDS: dict[str, PixelLoss] = {"fused": fused_pixel_loss, "reference": reference_pixel_loss}


def check_backend(backend: str) -> None:
    """Raise ValueError unless the backend is ``"auto"`` or one of `BACKENDS`."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: found {backend!r}, expected one of {', '.join(map(repr, ('auto', *BACKENDS)))}")


def pixel_loss(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    *,
    foreground_weight: float,
    ignore_index: int,
    backend: str = "auto",
) -> Tensor:
    """Compute the loss of every pixel; shapes are the caller's to check.

    Args:
        logits: ``(N, C, *spatial)`` with C >= 2 and any number of spatial dimensions, floating point, any strides.
        target: ``(N, *spatial)``, any integer dtype, ``0..C-1`` or ``ignore_index``.
        foreground: ``(C,)`` offsets, constants: no gradient flows to them.
        background: ``(C,)`` offsets, likewise.
        foreground_weight: Weight of the term of the labelled class.
        ignore_index: Label of void pixels; their loss and gradient are 0 whatever their logits.
        backend: A key of `BACKENDS`, or ``"auto"``: fused, except in an exported graph.

    Returns:
        ``(N, *spatial)`` >= 0, in the dtype of the logits or float32, whichever is wider.

    Raises:
        ValueError: Unknown backend, or a label that is neither a class nor ``ignore_index``. Labels are checked on the
            CPU only, and not in compiled code: elsewhere the check would make the host wait for the device.
    """
    check_backend(backend)
    if logits.ndim == 2:  # (N, C): N pixels without an image around them
        pixels = pixel_loss(
            logits.T[None],
            target[None],
            foreground,
            background,
            foreground_weight=foreground_weight,
            ignore_index=ignore_index,
            backend=backend,
        )
        return pixels[0]
    # int64 is what gather and scatter want; it also keeps a negative ignore_index from wrapping around in uint8
    target = target.long()
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(target, logits.shape[1], ignore_index)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # dtype before device: some devices have no float64
    foreground, background = (o.detach().to(dtype).to(logits.device) for o in (foreground, background))
    if backend == "auto":
        backend = "reference" if _exporting() else "fused"
    return BACKENDS[backend](logits, target, foreground, background, foreground_weight, ignore_index)


def _exporting() -> bool:
    # torch.export drops an autograd.Function and keeps the operations of its forward, some of them in place: only the
    # reference stays differentiable. Before torch 2.7 exporting cannot be told from compiling.
    is_exporting: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is not None and is_exporting()


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError for a label that is neither a class nor ``ignore_index``; the host waits for the device."""
    if target.numel() == 0:
        return
    labels = target.masked_fill(target == ignore_index, 0)
    low, high = (int(extreme) for extreme in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"target: found label {low if low < 0 else high}, expected 0..{num_classes - 1} or ignore_index "
            f"{ignore_index}; map labels outside the classes to {ignore_index}"
        )
