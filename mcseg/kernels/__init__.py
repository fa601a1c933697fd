"""Losses per pixel and soft counts per class, predicted classes and their counts: each operation implemented several ways.

Implementations agree on value, gradient and tie-breaking: of several largest logits the lowest index counts as the
largest, and the lowest of the remaining ones as its runner-up.

* ``"reference"``: plain PyTorch, written to be read, on any device, differentiable as often as one likes;
* ``"fused"``: the gradient by formula, tile by tile on the CPU;
* ``"triton"``: kernels on a GPU, in float32 inside; logits of at most that width.

`_OPERATIONS` says which operation has which; where one that it has not is asked for, the reference serves. ``"auto"`` is
triton on a GPU that has it, else fused; the reference where code is exported or, on the CPU, compiled.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels import confusion, fused_counts, fused_loss, reference
from mcseg.kernels.upsample import Upsampling, neighbours, upsampled

__all__ = [
    "BACKENDS",
    "Upsampling",
    "check_backend",
    "check_labels",
    "check_predictions",
    "confusion_counts",
    "neighbours",
    "pixel_loss",
    "predicted_classes",
    "soft_counts",
    "weighted_pixel_loss",
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
    """Compute the paper's loss of every pixel; shapes are the caller's to check.

    With logits ``z`` (one per class), label ``y``, class margins ``s_k = z_k - max_{j != k} z_j`` and phi the softplus::

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
    if _chosen("pixel_loss", backend, logits) != "reference":
        offsets = (foreground, background)
        return _run("pixel_loss", logits, target, offsets, (foreground_weight, ignore_index), backend, upsampling)
    num_classes = logits.shape[1]
    misses = torch.full_like(foreground, foreground_weight / num_classes)
    false_alarms = torch.full_like(background, 1 / num_classes)
    constants = (foreground, background, misses, false_alarms)
    return _run("weighted_pixel_loss", logits, target, constants, (ignore_index,), backend, upsampling)


def weighted_pixel_loss(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor,
    *,
    ignore_index: int,
    backend: str = "auto",
    upsampling: Upsampling | None = None,
) -> Tensor:
    """Compute the terms of `pixel_loss` with a weight for each class and kind of error, not divided by C.

    With the weights u of misses and v of false alarms::

        u_y * phi(foreground_y - s_y) + sum_{k != y} v_k * phi(background_k + s_k)

    Args:
        logits: As in `pixel_loss`, likewise all that is not named here; so are the result and the errors.
        target: See there.
        foreground: See there.
        background: See there.
        misses: ``(C,)`` weights, constants.
        false_alarms: ``(C,)`` weights, constants.
        ignore_index: See there.
        backend: See there.
        upsampling: See there.
    """
    constants = (foreground, background, misses, false_alarms)
    return _run("weighted_pixel_loss", logits, target, constants, (ignore_index,), backend, upsampling)


def soft_counts(
    logits: Tensor,
    target: Tensor,
    *,
    power: float = 1.0,
    ignore_index: int = 255,
    backend: str = "auto",
    upsampling: Upsampling | None = None,
) -> Tensor:
    """Sum over all labelled pixels, for every class, labels and soft errors from powers of the softmax p.

    A pixel with label y misses by ``1 - p_y^power`` and is a false alarm of every other class by ``1 - (1 - p_k)^power``;
    with power 1 the hits and false alarms are the probabilities themselves.

    Args:
        logits: As in `pixel_loss`, likewise ``target``, ``ignore_index``, ``backend`` and ``upsampling``; and the errors.
        target: See there.
        power: q, above 0 and up to 1.
        ignore_index: See there.
        backend: See there.
        upsampling: See there.

    Returns:
        ``(3, C)``: labelled pixels, misses, false alarms, in the dtype of the logits or float32, whichever is wider.

    Example:
        >>> import torch
        >>> from mcseg.kernels import soft_counts
        >>> soft_counts(torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1]))
        tensor([[1.0000, 1.0000],
                [0.0474, 0.3775],
                [0.3775, 0.0474]])
    """
    return _run("soft_counts", logits, target, (), (power, ignore_index), backend, upsampling)


@torch.no_grad()
def predicted_classes(logits: Tensor, size: tuple[int, ...] | None = None, upsampling: Upsampling | None = None) -> Tensor:
    """Find the class of the largest logit of every pixel; of equal ones the lowest.

    Triton on a GPU that has it, else PyTorch by blocks.

    Args:
        logits: ``(N, C, *spatial)``, floating point, any strides.
        size: ``(H, W)`` of the result where there is an upsampling: that of the upsampled logits, or less, counted from the
            first row and column.
        upsampling: How logits ``(N, C, h, w)`` are upsampled before; the upsampled ones are not held.

    Returns:
        ``(N, *spatial)`` or ``(N, H, W)``; uint8 up to 256 classes, else int16. Where a logit is NaN, any class.

    Example:
        >>> import torch
        >>> from mcseg.kernels import predicted_classes
        >>> predicted_classes(torch.tensor([[2.0, -1.0], [0.5, 1.0]]))
        tensor([0, 1], dtype=torch.uint8)
    """
    shape = logits.shape[2:] if upsampling is None else torch.Size(size or upsampling[:2])
    z = logits.detach()
    if z.ndim == 2:  # (N, C): N pixels without an image around them
        z = z.T[None]
    spatial = z.shape[2:] if upsampling is None else shape
    if upsampling is not None and torch.compiler.is_compiling() and not z.is_cuda:
        z, upsampling = _interpolated(z, spatial, upsampling), None
    if z.is_cuda and _runs_triton(z):
        found: Tensor = _gpu().predicted_classes(z, list(spatial), *(upsampling or (0, 0, False)))
    else:
        found = confusion.predicted(z, spatial, upsampling)
    return found.view(len(logits), *shape)


def confusion_counts(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Count pixels by target and prediction; Triton on a GPU that has it, else PyTorch by blocks.

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

    Example:
        >>> import torch
        >>> from mcseg.kernels import confusion_counts
        >>> confusion_counts(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 255]), num_classes=2)
        (tensor([[1, 0],
                [1, 1]]), tensor(0))
    """
    check_predictions(preds, target)
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        count = _gpu().confusion_counts if target.is_cuda and _HAS_TRITON else confusion.counted_anywhere
        found: Tensor = count(preds, target, num_classes, ignore_index)
        return found[:-1].view(num_classes, num_classes), found[-1]
    counts = confusion.counted(preds, target, num_classes, ignore_index).view(num_classes, num_classes)
    return counts, counts.new_zeros(())


def check_predictions(preds: Tensor, target: Tensor) -> None:
    """Raise TypeError or ValueError unless predictions and target are integers of the same shape."""
    for name, labels in (("preds", preds), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name}: found dtype {labels.dtype}, expected integer classes")
    if preds.shape != target.shape:
        raise ValueError(f"preds: found shape {tuple(preds.shape)}, expected {tuple(target.shape)}, the shape of the target")


def _gpu() -> Any:
    from mcseg.kernels import gpu  # imports triton

    return gpu


class _Operation(NamedTuple):
    """Implementations of an operation, called as ``(logits, target, *constants, *settings)``.

    They get logits with a spatial dimension, target int64 and constants ``(C,)`` float32 or wider on the logits' device;
    triton's also ``height, width, align_corners`` of an upsampling, where there is one.
    """

    per_pixel: bool  # whether it gives ``(N, *spatial)``, or sums over all pixels
    reference: Callable[..., Tensor] | None
    fused: Callable[..., Tensor] | None
    triton: Callable[..., Tensor] | None


def _triton_pixel_loss(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    foreground_weight: float,
    ignore_index: int,
    *upsampling: int,
) -> Tensor:
    num_classes = logits.shape[1]
    misses = torch.full_like(foreground, foreground_weight / num_classes)
    vectors = (foreground, background, misses, None, 1 / num_classes)
    return _on_gpu("margin_loss", logits, target, *vectors, ignore_index, upsampling=upsampling)


def _triton_weighted_pixel_loss(
    logits: Tensor,
    target: Tensor,
    foreground: Tensor,
    background: Tensor,
    misses: Tensor,
    false_alarms: Tensor,
    ignore_index: int,
    *upsampling: int,
) -> Tensor:
    vectors = (foreground, background, misses, false_alarms, 0.0)
    return _on_gpu("margin_loss", logits, target, *vectors, ignore_index, upsampling=upsampling)


def _triton_soft_counts(logits: Tensor, target: Tensor, power: float, ignore_index: int, *upsampling: int) -> Tensor:
    return _on_gpu("soft_counts", logits, target, power, ignore_index, upsampling=upsampling)


def _on_gpu(name: str, logits: Tensor, *given: Any, upsampling: tuple[int, ...]) -> Tensor:
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    found: Tensor = getattr(_gpu(), name)(logits, *given, *(upsampling or (0, 0, False)), differentiable)[0]
    return found


_OPERATIONS = {
    "pixel_loss": _Operation(True, None, fused_loss.pixel_loss, _triton_pixel_loss),
    "weighted_pixel_loss": _Operation(True, reference.weighted_pixel_loss, None, _triton_weighted_pixel_loss),
    "soft_counts": _Operation(False, reference.soft_counts, fused_counts.soft_counts, _triton_soft_counts),
}


def _run(
    name: str,
    logits: Tensor,
    target: Tensor,
    constants: Sequence[Tensor],
    settings: tuple[float, ...],
    backend: str,
    upsampling: Upsampling | None,
) -> Tensor:
    """Prepare what every operation needs and call the implementation; the last of the settings is the ignore_index."""
    chosen = _chosen(name, backend, logits)
    operation = _OPERATIONS[name]
    if upsampling is not None and chosen != "triton":

        def at_full_size(z: Tensor, y: Tensor) -> Tensor:
            return _run(name, z, y, constants, settings, chosen, None)

        if torch.compiler.is_compiling():  # which decides itself what is kept
            return at_full_size(_interpolated(logits, target.shape[-2:], upsampling), target)
        return upsampled(at_full_size, logits, target, upsampling, per_pixel=operation.per_pixel)
    # int64 is what gather and scatter want; it also keeps a negative ignore_index from wrapping around in uint8
    target = target.long()
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(target, logits.shape[1], int(settings[-1]))
    shape = target.shape
    if logits.ndim == 2:  # (N, C): N pixels without an image around them
        logits, target = logits.T[None], target[None]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # dtype before device: some devices have no float64
    vectors = (vector.detach().to(dtype).to(logits.device) for vector in constants)
    implementation: Callable[..., Tensor] = getattr(operation, chosen)
    found = implementation(logits, target, *vectors, *settings, *(upsampling or ()))
    return found.view(shape) if operation.per_pixel and found.shape != shape else found


def _interpolated(logits: Tensor, size: torch.Size, upsampling: Upsampling) -> Tensor:
    """Upsampled logits of the first ``size`` rows and columns, in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = F.interpolate(z, upsampling[:2], mode="bilinear", align_corners=upsampling.align_corners)
    return z[..., : size[0], : size[1]]


def _chosen(name: str, backend: str, logits: Tensor) -> str:
    """The implementation to use: ``"reference"``, ``"fused"`` or ``"triton"``."""
    check_backend(backend)
    runs = _runs_triton(logits)
    if backend == "triton" and not runs:
        raise ValueError(
            f"backend: found 'triton' with {logits.dtype} on {logits.device.type}, expected logits of at most 32 bits on a "
            "GPU, and the package triton; 'auto' takes what can be used"
        )
    if backend == "auto":
        backend = "triton" if runs and logits.is_cuda and not _exporting() else "fused"
    # An exporter drops an autograd.Function and keeps the operations of its forward; a compiler fuses by itself.
    if backend == "fused" and (_OPERATIONS[name].fused is None or torch.compiler.is_compiling()):
        return "reference"
    return backend


def _runs_triton(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and _HAS_TRITON and (logits.is_cuda or _INTERPRETING)


def _exporting() -> bool:
    # before torch 2.7 exporting cannot be told from compiling
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
