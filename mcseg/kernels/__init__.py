"""Errors at calibrated margins, predicted classes and their counts, implemented several ways.

At a pixel with logits ``z`` (one per class), label ``y`` and class margins ``s_k`` (hard: ``z_k - max_{j != k} z_j``), a
surrogate ``phi`` counts a miss as ``phi(foreground_y - s_y)`` and a false alarm of each other class as
``phi(background_k + s_k)``; `mcseg.losses.family` has the whole family. `pixel_loss` is the paper's member, `pixel_errors` a
weighted sum per pixel of any member, `error_counts` the sums per class.

Implementations agree on value, gradient and tie-breaking: of several largest logits the lowest index counts as the
largest, and the lowest of the remaining ones as its runner-up.

* ``"reference"``: plain PyTorch, one readable function for all members, on any device, differentiable as often as one likes;
* ``"fused"``: the gradient by formula, tile by tile on the CPU. Only `pixel_loss`, and `error_counts` of soft margins with
  the sigmoid, have it; where it is asked for elsewhere, the reference serves;
* ``"triton"``: one kernel for all members on a GPU, in float32 inside; logits of at most that width.

``"auto"`` is triton on a GPU that has it, else fused; the reference in an exported graph.

`predicted_classes` and `confusion_counts` have no backend to choose: Triton on a GPU that has it, else PyTorch by blocks.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from .confusion import counted, predicted
from .counts import soft_error_counts
from .fused import fused_pixel_loss
from .reference import ErrorKind, Margin, Surrogate, error_sums, surrogate_errors, weighted_sum
from .upsample import Upsampling, neighbours, upsampled

__all__ = [
    "BACKENDS",
    "ErrorKind",
    "Margin",
    "Surrogate",
    "Upsampling",
    "check_backend",
    "check_labels",
    "check_predictions",
    "confusion_counts",
    "error_counts",
    "neighbours",
    "pixel_errors",
    "pixel_loss",
    "predicted_classes",
]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the kernels on the CPU, for tests
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

BACKENDS = ("fused", "reference", "triton")


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
    upsampling: Upsampling | None = None,
) -> Tensor:
    """Compute the paper's loss of every pixel, hard margins with the log surrogate; shapes are the caller's to check.

    With phi the softplus::

        [ foreground_weight * phi(foreground_y - s_y) + sum_{k != y} phi(background_k + s_k) ] / C

    Args:
        logits: ``(N, C, *spatial)`` with C >= 2 and any number of spatial dimensions, floating point, any strides.
        target: ``(N, *spatial)``, any integer dtype, ``0..C-1`` or ``ignore_index``.
        foreground: ``(C,)`` offsets, constants: no gradient flows to them.
        background: ``(C,)`` offsets, likewise.
        foreground_weight: Weight of the term of the labelled class.
        ignore_index: Label of void pixels; their loss and gradient are 0 whatever their logits.
        backend: ``"auto"`` or one of `BACKENDS`.
        upsampling: How logits ``(N, C, h, w)`` come to the size of the target ``(N, H, W)``, a strip of rows at a time;
            None: they have it.

    Returns:
        ``(N, *spatial)`` >= 0, in the dtype of the logits or float32, whichever is wider.

    Raises:
        ValueError: Unknown backend, a backend that cannot be used here, or a label that is neither a class nor
            ``ignore_index``. Labels are checked on the CPU only, and not in compiled code: elsewhere the check would make
            the host wait for the device, and such a label gives NaN from the kernels.
    """
    backend = _chosen(backend, logits)
    if upsampling is not None and backend != "triton":
        settings = {"foreground_weight": foreground_weight, "ignore_index": ignore_index, "backend": backend}
        return upsampled(
            lambda z, y: pixel_loss(z, y, foreground, background, **settings),  # type: ignore[arg-type]
            logits,
            target,
            upsampling,
            per_pixel=True,
        )
    if backend == "fused":
        logits, target, shape = _prepared(logits, target, ignore_index)
        foreground, background = _constants(logits, foreground, background)
        loss = fused_pixel_loss(logits, target, foreground, background, foreground_weight, ignore_index)
        return loss if loss.shape == shape else loss.view(shape)
    num_classes = logits.shape[1]
    misses = torch.full_like(foreground, foreground_weight / num_classes)
    false_alarms = torch.full_like(background, 1 / num_classes)
    kind = ErrorKind(ignore_index=ignore_index)
    return pixel_errors(logits, target, foreground, background, misses, false_alarms, kind, backend, upsampling)


def pixel_errors(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor,
    kind: ErrorKind,
    backend: str = "auto",
    upsampling: Upsampling | None = None,
) -> Tensor:
    """Compute of every pixel the weighted sum of its miss and its false alarms.

    Args:
        logits: As in `pixel_loss`, likewise ``target``, ``foreground``, ``background`` and ``backend``.
        target: See there.
        foreground: See there.
        background: See there.
        misses: ``(C,)`` weights, constants.
        false_alarms: ``(C,)`` weights, constants.
        kind: Margin, surrogate and label of void pixels.
        backend: See there.
        upsampling: See there.

    Returns:
        ``(N, *spatial)`` in the dtype of the logits or float32, whichever is wider, 0 where void.
    """
    backend = _chosen(backend, logits)
    if upsampling is not None and backend != "triton":
        return upsampled(
            lambda z, y: pixel_errors(z, y, foreground, background, misses, false_alarms, kind, backend),
            logits,
            target,
            upsampling,
            per_pixel=True,
        )
    logits, target, shape = _prepared(logits, target, kind.ignore_index)
    constants = _constants(logits, foreground, background, misses, false_alarms)
    if backend == "triton":
        from . import gpu

        loss: Tensor = gpu.pixel_errors(logits, target, *constants, *_settings(kind), *(upsampling or ()))
        return loss.view(shape)
    foreground, background, misses, false_alarms = constants
    errors, is_label = surrogate_errors(logits, target, foreground, background, kind)
    return weighted_sum(errors, is_label, misses, false_alarms).view(shape)


def error_counts(
    logits: Tensor,
    target: Tensor,
    offsets: tuple[Tensor, Tensor] | None,
    kind: ErrorKind,
    backend: str = "auto",
    upsampling: Upsampling | None = None,
) -> Tensor:
    """Sum the errors of every class over all pixels.

    Args:
        logits: As in `pixel_loss`, likewise ``target`` and ``backend``.
        target: See there.
        offsets: Foreground and background, ``(C,)`` each, constants; None: all are 0.
        kind: Margin, surrogate and label of void pixels.
        backend: See there.
        upsampling: See there.

    Returns:
        ``(3, C)``: labelled pixels, misses, false alarms, in the dtype of the logits or float32, whichever is wider.
    """
    backend = _chosen(backend, logits)
    if upsampling is not None and backend != "triton":
        return upsampled(
            lambda z, y: error_counts(z, y, offsets, kind, backend), logits, target, upsampling, per_pixel=False
        )
    logits, target, _ = _prepared(logits, target, kind.ignore_index)
    if backend == "fused" and (kind.margin, kind.surrogate) == ("soft", "sigmoid"):
        return soft_error_counts(logits, target, offsets and _constants(logits, *offsets), kind.power, kind.ignore_index)
    zeros = torch.zeros(logits.shape[1], device=logits.device)
    foreground, background = _constants(logits, *(offsets or (zeros, zeros)))
    if backend == "triton":
        from . import gpu

        offset_vectors = (foreground, background)
        counts: Tensor = gpu.error_counts(logits, target, *offset_vectors, *_settings(kind), *(upsampling or ()))
        return counts
    return error_sums(*surrogate_errors(logits, target, foreground, background, kind))


@torch.no_grad()
def predicted_classes(logits: Tensor, size: tuple[int, ...] | None = None, upsampling: Upsampling | None = None) -> Tensor:
    """Find the class of the largest logit of every pixel; of equal ones the lowest.

    Args:
        logits: ``(N, C, *spatial)``, floating point, any strides.
        size: ``(H, W)`` of the result where there is an upsampling: that of the upsampled logits, or less, counted from the
            first row and column.
        upsampling: How logits ``(N, C, h, w)`` are upsampled before; the upsampled ones are not held.

    Returns:
        ``(N, *spatial)`` or ``(N, H, W)``; uint8 up to 256 classes, else int16. Where a logit is NaN, any class.
    """
    shape = logits.shape[2:] if upsampling is None else torch.Size(size or upsampling[:2])
    z = logits.detach()
    if z.ndim == 2:  # (N, C): N pixels without an image around them
        z = z.T[None]
    spatial = z.shape[2:] if upsampling is None else shape
    if z.is_cuda and _runs_triton(z):
        from . import gpu

        found: Tensor = gpu.predicted_classes(z, list(spatial), *(upsampling or ()))
    else:
        found = predicted(z, spatial, upsampling)
    return found.view(len(logits), *shape)


def confusion_counts(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Count pixels by target and prediction.

    Args:
        preds: Integers 0..C-1, any shape.
        target: Integers 0..C-1 or ``ignore_index``, of the same shape.
        num_classes: Number of classes C.
        ignore_index: Target that counts nowhere, whatever the prediction.

    Returns:
        ``(C, C)`` int64, rows are targets, columns predictions; and a scalar, the number of pixels that could not be counted
        as their target or prediction is no class: always 0 on the CPU. The host does not wait for a GPU.

    Raises:
        TypeError: Predictions or target are not integers.
        ValueError: Predictions and target have different shapes, or, on the CPU, such a pixel.
    """
    check_predictions(preds, target)
    if target.is_cuda and _HAS_TRITON:
        from . import gpu

        found: Tensor = gpu.confusion_counts(preds, target, num_classes, ignore_index)
        return found[:-1].view(num_classes, num_classes), found[-1]
    counts = counted(preds, target, num_classes, ignore_index).view(num_classes, num_classes)
    return counts, counts.new_zeros(())


def check_predictions(preds: Tensor, target: Tensor) -> None:
    """Raise TypeError or ValueError unless predictions and target are integers of the same shape."""
    for name, labels in (("preds", preds), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name}: found dtype {labels.dtype}, expected integer classes")
    if preds.shape != target.shape:
        raise ValueError(f"preds: found shape {tuple(preds.shape)}, expected {tuple(target.shape)}, the shape of the target")


def _prepared(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, torch.Size]:
    """Logits with a spatial dimension, int64 labels that are checked; and the target's shape."""
    # int64 is what gather and scatter want; it also keeps a negative ignore_index from wrapping around in uint8
    target = target.long()
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(target, logits.shape[1], ignore_index)
    shape = target.shape
    if logits.ndim == 2:  # (N, C): N pixels without an image around them
        logits, target = logits.T[None], target[None]
    return logits, target, shape


def _constants(logits: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # dtype before device: some devices have no float64
    return tuple(vector.detach().to(dtype).to(logits.device) for vector in vectors)


def _settings(kind: ErrorKind) -> tuple[bool, bool, float, int]:
    return kind.margin == "soft", kind.surrogate == "log", kind.power, kind.ignore_index


def _chosen(backend: str, logits: Tensor) -> str:
    check_backend(backend)
    runs = _runs_triton(logits)
    if backend == "triton" and not runs:
        raise ValueError(
            f"backend: found 'triton' with {logits.dtype} on {logits.device.type}, expected logits of at most 32 bits on a "
            "GPU, and the package triton; 'auto' takes what can be used"
        )
    if backend != "auto":
        return backend
    if _exporting():
        return "reference"
    return "triton" if runs and logits.is_cuda else "fused"


def _runs_triton(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and _HAS_TRITON and (logits.is_cuda or _INTERPRETING)


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
