"""Losses per pixel, soft counts per class, predicted classes and confusion counts, with several implementations each.

All implementations agree on value, gradient and tie-breaking: among equal largest logits, the one of the lowest class index
is the largest, and the next lowest is its runner-up.

* ``"reference"``: readable PyTorch on any device, differentiable any number of times.
* ``"fused"``: computes the gradient by formula, tile by tile on the CPU.
* ``"triton"``: GPU kernels that compute in float32; does not accept float64 logits.

`_OPERATIONS` lists the implementations of each operation; the reference replaces a missing fused one. ``"auto"`` selects
triton on a GPU if the package is installed, and fused otherwise. Exported code, and compiled code on the CPU, use the
reference.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels import confusion, fused_counts, fused_loss, reference
from mcseg.kernels.upsample import Upsampling, apply_upsampled, neighbours

__all__ = [
    "BACKENDS",
    "Upsampling",
    "check_backend",
    "check_labels",
    "check_predictions",
    "confusion_counts",
    "fuses_upsampling",
    "neighbours",
    "pixel_loss",
    "predicted_classes",
    "soft_counts",
    "weighted_pixel_loss",
]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's interpreter runs the kernels on the CPU, for tests
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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
    """Compute the paper's loss of every pixel, without checking shapes.

    With logits ``z`` (one per class), label ``y``, class margins ``s_k = z_k - max_{j != k} z_j`` and phi the softplus::

        [ foreground_weight * phi(foreground_y - s_y) + sum_{k != y} phi(background_k + s_k) ] / C

    Args:
        logits: ``(N, C, *spatial)`` with C >= 2 and any number of spatial dimensions, floating point, any strides.
        target: ``(N, *spatial)``, any integer dtype, ``0..C-1`` or ``ignore_index``.
        foreground: ``(C,)`` offsets, floating point; no gradient flows to them.
        background: ``(C,)`` offsets, floating point; no gradient flows to them.
        foreground_weight: Weight of the labelled class's term.
        ignore_index: Label of void pixels; their loss and gradient are 0 even if their logits are not finite.
        backend: ``"auto"`` or one of `BACKENDS`.
        upsampling: Bilinear upsampling of logits ``(N, C, h, w)`` for a target ``(N, H, W)``, computed a strip of rows at a
            time; None if the logits have the size of the target.

    Returns:
        ``(N, *spatial)`` >= 0, in the dtype of the logits or float32, whichever is wider.

    Raises:
        ValueError: The backend is unknown or cannot run here, or a label is neither a class nor ``ignore_index``. Labels are
            checked only on the CPU and outside compiled code, because the host would wait for a GPU; there such a label
            makes the triton loss NaN.
    """
    if _select_backend("pixel_loss", backend, logits) != "reference":
        return _dispatch(
            "pixel_loss",
            logits,
            target,
            constants={"foreground": foreground, "background": background},
            scalars={"foreground_weight": foreground_weight},
            ignore_index=ignore_index,
            backend=backend,
            upsampling=upsampling,
        )
    num_classes = logits.shape[1]
    return weighted_pixel_loss(
        logits,
        target,
        foreground=foreground,
        background=background,
        misses=torch.full_like(foreground, foreground_weight / num_classes),
        false_alarms=torch.full_like(background, 1 / num_classes),
        ignore_index=ignore_index,
        backend=backend,
        upsampling=upsampling,
    )


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
    """Compute the loss of `pixel_loss` with one weight per class and kind of error, and without the division by C.

    With the weights u of misses and v of false alarms::

        u_y * phi(foreground_y - s_y) + sum_{k != y} v_k * phi(background_k + s_k)

    Args:
        logits: ``(N, C, *spatial)``, as in `pixel_loss`.
        target: ``(N, *spatial)``, as in `pixel_loss`.
        foreground: ``(C,)`` offsets, as in `pixel_loss`.
        background: ``(C,)`` offsets, as in `pixel_loss`.
        misses: ``(C,)`` weights, floating point; no gradient flows to them.
        false_alarms: ``(C,)`` weights, floating point; no gradient flows to them.
        ignore_index: Label of void pixels.
        backend: ``"auto"`` or one of `BACKENDS`.
        upsampling: As in `pixel_loss`.

    Returns:
        ``(N, *spatial)``, in the dtype of the logits or float32, whichever is wider.

    Raises:
        ValueError: As in `pixel_loss`.
    """
    return _dispatch(
        "weighted_pixel_loss",
        logits,
        target,
        constants={"foreground": foreground, "background": background, "misses": misses, "false_alarms": false_alarms},
        scalars={},
        ignore_index=ignore_index,
        backend=backend,
        upsampling=upsampling,
    )


def soft_counts(
    logits: Tensor,
    target: Tensor,
    *,
    power: float = 1.0,
    ignore_index: int = 255,
    backend: str = "auto",
    upsampling: Upsampling | None = None,
) -> Tensor:
    """Count labelled pixels, soft misses and soft false alarms of every class over all pixels.

    With the softmax p, a pixel with label y adds ``1 - p_y^power`` to the misses of class y and ``1 - (1 - p_k)^power`` to
    the false alarms of every other class k. With power 1 the soft hits and false alarms are the probabilities themselves.

    Args:
        logits: ``(N, C, *spatial)``, as in `pixel_loss`.
        target: ``(N, *spatial)``, as in `pixel_loss`.
        power: Exponent, 0 < power <= 1.
        ignore_index: Label of void pixels; they are not counted.
        backend: ``"auto"`` or one of `BACKENDS`.
        upsampling: As in `pixel_loss`.

    Returns:
        ``(3, C)``: labelled pixels, misses, false alarms, in the dtype of the logits or float32, whichever is wider.

    Raises:
        ValueError: As in `pixel_loss`.

    Example:
        >>> import torch
        >>> from mcseg.kernels import soft_counts
        >>> soft_counts(torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1]))
        tensor([[1.0000, 1.0000],
                [0.0474, 0.3775],
                [0.3775, 0.0474]])
    """
    return _dispatch(
        "soft_counts",
        logits,
        target,
        constants={},
        scalars={"power": power},
        ignore_index=ignore_index,
        backend=backend,
        upsampling=upsampling,
    )


@torch.no_grad()
def predicted_classes(logits: Tensor, size: tuple[int, ...] | None = None, upsampling: Upsampling | None = None) -> Tensor:
    """Find the class of the largest logit of every pixel, the lowest class if several are equal.

    Uses Triton on a GPU if the package is installed, and otherwise PyTorch, tile by tile on the CPU.

    Args:
        logits: ``(N, C, *spatial)``, floating point, any strides.
        size: ``(H, W)`` of the result if ``upsampling`` is given: the first H rows and W columns of the upsampled logits.
            Default: all of them.
        upsampling: Bilinear upsampling of logits ``(N, C, h, w)``, never held in memory as a whole; None for none.

    Returns:
        ``(N, *spatial)`` or ``(N, H, W)``; uint8 up to 256 classes, otherwise int16. Any class for a pixel with NaN.

    Example:
        >>> import torch
        >>> from mcseg.kernels import predicted_classes
        >>> predicted_classes(torch.tensor([[2.0, -1.0], [0.5, 1.0]]))
        tensor([0, 1], dtype=torch.uint8)
    """
    shape = logits.shape[2:] if upsampling is None else torch.Size(size or upsampling[:2])
    z = logits.detach()
    if z.ndim == 2:  # (N, C): pixels without spatial dimensions
        z = z.T[None]
    spatial = z.shape[2:] if upsampling is None else shape
    if upsampling is not None and torch.compiler.is_compiling() and not z.is_cuda:
        z, upsampling = _interpolate(z, spatial, upsampling), None
    preds: Tensor
    if z.is_cuda and _can_run_triton(z):
        preds = _gpu().predicted_classes(z, list(spatial), **_upsampling_arguments(upsampling))
    else:
        preds = confusion.predict(z, spatial, upsampling)
    return preds.view(len(logits), *shape)


def confusion_counts(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Count pixels by target and prediction.

    Uses Triton on a GPU if the package is installed, and otherwise PyTorch, block by block on the CPU. The host does not
    wait for a GPU.

    Args:
        preds: Integers 0..C-1, any shape.
        target: Integers 0..C-1 or ``ignore_index``, of the same shape.
        num_classes: Number of classes C.
        ignore_index: Target of void pixels; they are not counted.

    Returns:
        Counts ``(C, C)`` int64, rows are targets, columns predictions; and the number of pixels whose target or prediction
        is not a class, an int64 scalar that is always 0 on the CPU.

    Raises:
        TypeError: Predictions or target are not integers.
        ValueError: Predictions and target have different shapes, or, on the CPU, a target or prediction is not a class.

    Example:
        >>> import torch
        >>> from mcseg.kernels import confusion_counts
        >>> confusion_counts(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 255]), num_classes=2)
        (tensor([[1, 0],
                [1, 1]]), tensor(0))
    """
    check_predictions(preds, target)
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        count = _gpu().confusion_counts if target.is_cuda and _HAS_TRITON else confusion.count_unchecked
        cells: Tensor = count(preds, target, num_classes=num_classes, ignore_index=ignore_index)
        return cells[:-1].view(num_classes, num_classes), cells[-1]
    cells = confusion.count_on_cpu(preds, target, num_classes=num_classes, ignore_index=ignore_index)
    return cells.view(num_classes, num_classes), cells.new_zeros(())


def check_predictions(preds: Tensor, target: Tensor) -> None:
    """Raise TypeError or ValueError unless predictions and target are integers of the same shape."""
    for name, labels in (("preds", preds), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name}: found dtype {labels.dtype}, expected an integer dtype; pass class indices")
    if preds.shape != target.shape:
        raise ValueError(
            f"preds: found shape {tuple(preds.shape)}, expected the shape {tuple(target.shape)} of the target; "
            "resize predictions to the target"
        )


def fuses_upsampling(device: torch.device) -> bool:
    """Whether losses of coarse logits are computed faster than those of upsampled ones on a device.

    This holds on a GPU with Triton, whose kernels interpolate in registers. Without Triton, and on the CPU, the logits are
    upsampled twice, a strip at a time, which saves memory but takes longer (``benchmarks/results/kernels-cpu.md``).
    """
    return device.type == "cuda" and _HAS_TRITON


def _gpu() -> Any:
    from mcseg.kernels import gpu  # imports triton

    return gpu


class _Operation(NamedTuple):
    """The implementations of an operation, one per backend.

    Each one takes logits with at least one spatial dimension and an int64 target, and by keyword the operation's constants,
    ``(C,)`` in float32 or wider on the logits' device, its scalars and ``ignore_index``. Those for triton also take
    ``upsampling``.

    Attributes:
        per_pixel: Whether the result is ``(N, *spatial)``; otherwise it is a sum over all pixels.
        reference: Implementation for the reference, or None.
        fused: Implementation for fused, or None.
        triton: Implementation for triton.
    """

    per_pixel: bool
    reference: Callable[..., Tensor] | None
    fused: Callable[..., Tensor] | None
    triton: Callable[..., Tensor]


def _triton_pixel_loss(
    logits: Tensor, target: Tensor, *, foreground: Tensor, foreground_weight: float, **arguments: Any
) -> Tensor:
    num_classes = logits.shape[1]
    misses = torch.full_like(foreground, foreground_weight / num_classes)
    arguments |= {"foreground": foreground, "misses": misses, "false_alarms": None, "weight": 1 / num_classes}
    return _call_triton("margin_loss", logits, target, **arguments)


def _triton_weighted_pixel_loss(logits: Tensor, target: Tensor, **arguments: Any) -> Tensor:
    return _call_triton("margin_loss", logits, target, weight=0.0, **arguments)


def _triton_soft_counts(logits: Tensor, target: Tensor, **arguments: Any) -> Tensor:
    return _call_triton("soft_counts", logits, target, **arguments)


def _call_triton(name: str, logits: Tensor, target: Tensor, *, upsampling: Upsampling | None, **arguments: Any) -> Tensor:
    arguments |= {"differentiable": torch.is_grad_enabled() and logits.requires_grad, **_upsampling_arguments(upsampling)}
    result: Tensor = getattr(_gpu(), name)(logits, target, **arguments)[0]
    return result


def _upsampling_arguments(upsampling: Upsampling | None) -> dict[str, Any]:
    """Arguments of the GPU kernels for an upsampling; a height of 0 is none."""
    height, width, align_corners = upsampling or (0, 0, False)
    return {"height": height, "width": width, "align_corners": align_corners}


_OPERATIONS = {
    "pixel_loss": _Operation(per_pixel=True, reference=None, fused=fused_loss.pixel_loss, triton=_triton_pixel_loss),
    "weighted_pixel_loss": _Operation(
        per_pixel=True, reference=reference.weighted_pixel_loss, fused=None, triton=_triton_weighted_pixel_loss
    ),
    "soft_counts": _Operation(
        per_pixel=False, reference=reference.soft_counts, fused=fused_counts.soft_counts, triton=_triton_soft_counts
    ),
}


def _dispatch(
    name: str,
    logits: Tensor,
    target: Tensor,
    *,
    constants: Mapping[str, Tensor],
    scalars: Mapping[str, float],
    ignore_index: int,
    backend: str,
    upsampling: Upsampling | None,
) -> Tensor:
    """Check and convert the inputs of an operation and call the selected implementation."""
    selected = _select_backend(name, backend, logits)
    operation = _OPERATIONS[name]
    if upsampling is not None and selected != "triton":
        at_full_size = partial(
            _dispatch,
            name,
            constants=constants,
            scalars=scalars,
            ignore_index=ignore_index,
            backend=selected,
            upsampling=None,
        )
        if torch.compiler.is_compiling():  # a compiler decides by itself which tensors to keep
            return at_full_size(_interpolate(logits, target.shape[-2:], upsampling), target)
        return apply_upsampled(at_full_size, logits, target, upsampling=upsampling, per_pixel=operation.per_pixel)
    # gather and scatter need int64; it also keeps a negative ignore_index from wrapping around in uint8
    target = target.long()
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(target, logits.shape[1], ignore_index)
    shape = target.shape
    if logits.ndim == 2:  # (N, C): pixels without spatial dimensions
        logits, target = logits.T[None], target[None]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    arguments: dict[str, Any] = {**scalars, "ignore_index": ignore_index}
    for key, vector in constants.items():
        # dtype before device: some devices have no float64
        arguments[key] = vector.detach().to(dtype).to(logits.device)
    if selected == "triton":
        arguments["upsampling"] = upsampling
    implementation: Callable[..., Tensor] = getattr(operation, selected)
    result = implementation(logits, target, **arguments)
    return result.view(shape) if operation.per_pixel and result.shape != shape else result


def _interpolate(logits: Tensor, size: torch.Size, upsampling: Upsampling) -> Tensor:
    """Upsample logits in float32 or wider and keep the first ``size`` rows and columns."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = F.interpolate(z, upsampling[:2], mode="bilinear", align_corners=upsampling.align_corners)
    return z[..., : size[0], : size[1]]


def _select_backend(name: str, backend: str, logits: Tensor) -> str:
    """Select the implementation to call: ``"reference"``, ``"fused"`` or ``"triton"``."""
    check_backend(backend)
    can_run_triton = _can_run_triton(logits)
    if backend == "triton" and not can_run_triton:
        raise ValueError(
            f"backend: found 'triton' with {logits.dtype} logits on {logits.device.type}, expected logits of at most 32 "
            "bits on a GPU and the package triton; use backend='auto' to select a backend that can run"
        )
    if backend == "auto":
        backend = "triton" if can_run_triton and logits.is_cuda and not _is_exporting() else "fused"
    # an exporter drops an autograd.Function and keeps the operations of its forward; a compiler fuses by itself
    if backend == "fused" and (_OPERATIONS[name].fused is None or torch.compiler.is_compiling()):
        return "reference"
    return backend


def _can_run_triton(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and _HAS_TRITON and (logits.is_cuda or _TRITON_INTERPRETED)


def _is_exporting() -> bool:
    # torch before 2.7 does not distinguish exporting from compiling
    is_exporting: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)
    return is_exporting is not None and is_exporting()


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError if a label is neither a class nor ``ignore_index``; the host waits for the device."""
    if target.numel() == 0:
        return
    labels = target.masked_fill(target == ignore_index, 0)
    low, high = (int(extreme) for extreme in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"target: found label {low if low < 0 else high}, expected 0..{num_classes - 1} or ignore_index "
            f"{ignore_index}; map labels outside the classes to {ignore_index}"
        )
