"""The margin-calibrated log-loss of Yu et al. (IJCV 2022) as a function and as a module."""

import inspect
from typing import Literal

from torch import Tensor

from mcseg.kernels import Upsampling, check_backend, pixel_loss
from mcseg.losses.base import (
    CalibratedLoss,
    as_upsampling,
    check_choice,
    check_inputs,
    check_range,
    mean_over_processes,
)
from mcseg.margins import MarginOffsets, Scheme, check_settings, margin_offsets

Reduction = Literal["mean", "sum", "none"]


def margin_calibration_loss(
    logits: Tensor,
    target: Tensor,
    offsets: MarginOffsets,
    *,
    foreground_weight: float | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
    backend: str = "auto",
    upsample: bool | Upsampling = False,
) -> Tensor:
    r"""Compute the margin-calibrated log-loss.

    With class margins ``s_k = z_k - max_{j != k} z_j``, ``softplus(t) = log(1 + exp(t))`` and label ``y``, the loss of a
    pixel is::

        [ foreground_weight * softplus(foreground_y - s_y) + sum_{k != y} softplus(background_k + s_k) ] / C

    Source: Yu et al., "Distribution-Aware Margin Calibration for Semantic Segmentation in Images", IJCV 130(1):95-110,
    2022, arXiv 2112.11554.

    Args:
        logits: ``(N, C, *spatial)``, floating point, C >= 2, any number of spatial dimensions, any strides. Unbounded
            scores, not probabilities; never overwritten.
        target: ``(N, *spatial)``, any integer dtype, ``0..C-1``, or ``ignore_index`` for void.
        offsets: Two tensors ``(C,)``, usually from `mcseg.margins.margin_offsets`; constants without gradient.
        foreground_weight: Weight >= 0 of the labelled class; None is C, as in the paper's code.
        ignore_index: Label of void pixels. Their loss and gradient are 0, whatever their logits.
        reduction: ``"mean"`` over labelled pixels, ``"sum"``, or ``"none"`` for one value per pixel.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``: implementations of the same function, see
            `mcseg.kernels`.
        upsample: True takes coarse logits ``(N, C, h, w)`` and upsamples them bilinearly to the target ``(N, H, W)``, with
            aligned corners as in segmentation_models_pytorch. It works on a strip of rows at a time, so the logits of
            full resolution never take memory. An `mcseg.kernels.Upsampling` sets size and alignment.

    Returns:
        A scalar, or ``(N, *spatial)`` for ``"none"``; >= 0, in the dtype of the logits or float32, whichever is wider.

    Raises:
        TypeError: Logits are not floating point, or the target is not of an integer dtype.
        ValueError: Shapes or numbers of classes do not match, an option is invalid, or (CPU only) a label is neither a
            class nor ``ignore_index``.

    Note:
        If all pixels are void, the loss is 0 with zero gradient. A NaN logit at a labelled pixel gives NaN.

    Example:
        >>> import torch
        >>> from mcseg.losses import margin_calibration_loss
        >>> from mcseg.margins import MarginOffsets
        >>> offsets = MarginOffsets(torch.zeros(2), torch.zeros(2))
        >>> margin_calibration_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([0]), offsets)
        tensor(0.0729)
    """
    upsampling = as_upsampling(upsample, target)
    check_margin_inputs(logits, target, offsets, upsampling)
    _check_choices(foreground_weight, reduction, backend)
    target = target.long()
    pixels = pixel_loss(
        logits,
        target,
        *offsets,
        foreground_weight=logits.shape[1] if foreground_weight is None else foreground_weight,
        ignore_index=ignore_index,
        backend=backend,
        upsampling=upsampling,
    )
    if reduction == "none":
        return pixels
    total = pixels.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)


class MarginLoss(CalibratedLoss):
    """Base class of objectives with a foreground and a background offset per class.

    A subclass computes the offsets from pixel counts in ``_offsets``.

    Args:
        num_classes: C >= 2.
        ignore_index: Label of void pixels.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Attributes:
        foreground_offsets: Buffer, float64 ``(C,)``, NaN until calibrated.
        background_offsets: Buffer, float64 ``(C,)``, NaN until calibrated.
        takes_coarse_logits: True.
    """

    foreground_offsets: Tensor
    background_offsets: Tensor
    takes_coarse_logits = True
    _stored = ("foreground_offsets", "background_offsets")
    _absent = "its offsets are 0"

    def __init__(self, num_classes: int, ignore_index: int, backend: str) -> None:
        check_backend(backend)
        super().__init__(num_classes, ignore_index)
        self.backend = backend

    @property
    def offsets(self) -> MarginOffsets:
        """The offsets, float64 ``(C,)`` each.

        Raises:
            RuntimeError: The loss is not calibrated.
        """
        self._require_calibrated()
        return MarginOffsets(self.foreground_offsets, self.background_offsets)

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """``foreground_offset`` and ``background_offset``, ``(C,)`` each; empty before calibration."""
        if not self._calibrated:
            return {}
        return {"foreground_offset": self.foreground_offsets, "background_offset": self.background_offsets}

    def _offsets(self, n: Tensor) -> MarginOffsets:
        """Compute the offsets from float64 counts ``(C,)``."""
        raise NotImplementedError

    def _values(self, n: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._stored, self._offsets(n), strict=True))


class MarginCalibrationLoss(MarginLoss):
    """The paper's loss: `margin_calibration_loss` with offsets from the pixel counts of the training labels.

    Call `calibrate` once before the first use, unless the scheme is ``"none"``. The ``state_dict`` holds the offsets, so a
    loss that loads a calibrated checkpoint needs no training labels. They stay float64 when the module is cast to another
    dtype.

    Args:
        num_classes: C >= 2.
        scheme: ``"ijcv2022"``, ``"miou"`` or ``"none"``: how offsets follow from counts, see
            `mcseg.margins.margin_offsets`.
        tau: Scale of the offsets of scheme ``"ijcv2022"``, > 0; other schemes refuse it.
        upsilon: Weight of background against foreground in scheme ``"ijcv2022"``, > 0; other schemes refuse it.
        foreground_weight: Weight >= 0 of the labelled class; None is ``num_classes``, as in the paper's code.
        ignore_index: Label of void pixels.
        reduction: ``"mean"`` over labelled pixels, ``"sum"`` or ``"none"``.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.
        max_margin: Largest offset of scheme ``"miou"`` in logit units, > 0; other schemes refuse it.

    Attributes:
        foreground_offsets: Buffer, float64 ``(C,)``, NaN until calibrated; 0 with scheme ``"none"``.
        background_offsets: Buffer, float64 ``(C,)``, NaN until calibrated; 0 with scheme ``"none"``.

    Raises:
        ValueError: A setting is out of range, or the scheme does not use it.

    Example:
        >>> import torch
        >>> from mcseg.losses import MarginCalibrationLoss
        >>> loss = MarginCalibrationLoss(num_classes=2, tau=1.0).calibrate([900, 100])
        >>> loss(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        tensor(0.0813)
    """

    def __init__(
        self,
        num_classes: int,
        scheme: Scheme = "ijcv2022",
        tau: float = 10.0,
        upsilon: float = 1.0,
        foreground_weight: float | None = None,
        ignore_index: int = 255,
        reduction: Reduction = "mean",
        backend: str = "auto",
        max_margin: float = 1.0,
    ) -> None:
        check_settings(scheme, tau, upsilon, max_margin)
        _refuse_unused(scheme, tau=tau, upsilon=upsilon, max_margin=max_margin)
        _check_choices(foreground_weight, reduction, backend)
        self.scheme: Scheme = scheme
        super().__init__(num_classes, ignore_index, backend)
        self.tau = tau
        self.upsilon = upsilon
        self.foreground_weight = foreground_weight
        self.reduction: Reduction = reduction
        self.max_margin = max_margin

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """``foreground_offset`` and ``background_offset``, ``(C,)`` each; empty before calibration or with ``"none"``."""
        return {} if self.scheme == "none" else super().class_constants

    def forward(self, logits: Tensor, target: Tensor, upsample: bool | Upsampling = False) -> Tensor:
        """Compute the loss; in training the mean is over the pixels of all processes of a group.

        Args:
            logits: ``(N, C, *spatial)`` floating point, unbounded scores.
            target: ``(N, *spatial)`` integers, ``0..C-1`` or ``ignore_index``.
            upsample: Whether to upsample coarse logits, and how; see `margin_calibration_loss`.

        Returns:
            A scalar, or ``(N, *spatial)`` for reduction ``"none"``; see `margin_calibration_loss`.

        Raises:
            RuntimeError: The loss is not calibrated.
            TypeError: See `margin_calibration_loss`.
            ValueError: See `margin_calibration_loss`.
        """
        total = margin_calibration_loss(
            logits,
            target,
            self.offsets,
            foreground_weight=self.foreground_weight,
            ignore_index=self.ignore_index,
            reduction="sum" if self.reduction == "mean" else self.reduction,
            backend=self.backend,
            upsample=upsample,
        )
        if self.reduction != "mean":
            return total
        # int64 before the comparison: uint8 would wrap an ignore_index outside 0..255
        return mean_over_processes(total, (target.long() != self.ignore_index).sum())

    def _offsets(self, n: Tensor) -> MarginOffsets:
        return margin_offsets(n, self.scheme, self.tau, self.upsilon, self.max_margin)

    def _reset_buffers(self) -> None:
        super()._reset_buffers()
        if self.scheme == "none":
            self.foreground_offsets.zero_()
            self.background_offsets.zero_()
            self._calibrated = True


def check_margin_inputs(logits: Tensor, target: Tensor, offsets: MarginOffsets, upsampling: Upsampling | None) -> None:
    """Raise TypeError or ValueError unless logits, target and offsets match each other."""
    check_inputs(logits, target, least_classes=2, upsampling=upsampling)
    for name, offset in zip(MarginOffsets._fields, offsets, strict=True):
        if offset.shape != logits.shape[1:2]:
            raise ValueError(
                f"logits: found {logits.shape[1]} classes but {name} offsets of shape {tuple(offset.shape)}, expected "
                "one offset per class; use the same number of classes in the network and in the loss"
            )


_TAKES: dict[Scheme, tuple[str, ...]] = {"ijcv2022": ("tau", "upsilon"), "miou": ("max_margin",), "none": ()}


def _refuse_unused(scheme: Scheme, **scales: float) -> None:
    # Only a value other than the default counts as given: the command writes all defaults into a run's config.
    defaults = inspect.signature(margin_offsets).parameters
    for name, value in scales.items():
        if name not in _TAKES[scheme] and value != defaults[name].default:
            takes = " and ".join(_TAKES[scheme]) or "none of tau, upsilon and max_margin"
            raise ValueError(f"{name}: found {value} with scheme {scheme!r}, which takes {takes}; leave {name} out")


def _check_choices(foreground_weight: float | None, reduction: str, backend: str) -> None:
    if foreground_weight is not None:
        check_range("foreground_weight", foreground_weight, 0)
    check_choice("reduction", reduction, Reduction)
    check_backend(backend)
