"""The margin-calibrated log-loss as a function and as a module."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor

from mcseg.kernels import (
    ErrorKind,
    Margin,
    Surrogate,
    Upsampling,
    check_backend,
    error_counts,
    pixel_errors,
    pixel_loss,
)
from mcseg.losses.base import Objective, check_choice, check_inputs, check_range, mean_over_processes
from mcseg.losses.family import (
    Aggregation,
    Classes,
    class_iou,
    confusion_shares,
    iou_weights,
    ratio,
)
from mcseg.margins import ClassPixels, MarginOffsets, Scheme, check_settings, margin_offsets

Reduction = Literal["mean", "sum", "none"]
Weighting = Literal["foreground", "uniform", "iou"]


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
    r"""Compute the margin-calibrated log-loss of logits against labels.

    With class margins ``s_k = z_k - max_{j != k} z_j``, ``softplus(t) = log(1 + exp(t))`` and label ``y``, a pixel has
    the loss::

        [ foreground_weight * softplus(foreground_y - s_y) + sum_{k != y} softplus(background_k + s_k) ] / C

    After Yu et al., "Distribution-Aware Margin Calibration for Semantic Segmentation in Images", IJCV 130(1):95-110,
    2022, arXiv 2112.11554.

    Args:
        logits: ``(N, C, *spatial)``, floating point, C >= 2, any number of spatial dimensions, any strides. Unbounded
            scores, not probabilities; never overwritten.
        target: ``(N, *spatial)``, any integer dtype, ``0..C-1``, or ``ignore_index`` where void.
        offsets: Two tensors ``(C,)``, as from `mcseg.margins.margin_offsets`; constants, no gradient flows to them.
        foreground_weight: Weight >= 0 of the labelled class; None is C, as in the paper's code.
        ignore_index: Label of void pixels: they have loss 0 and gradient 0, whatever their logits.
        reduction: ``"mean"`` over labelled pixels (0 where there are none), ``"sum"``, or ``"none"`` for all pixels.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``; the same function computed in different ways, see
            `mcseg.kernels`.
        upsample: True takes coarse logits ``(N, C, h, w)`` and upsamples them bilinearly to the target ``(N, H, W)``, with
            corners aligned as segmentation_models_pytorch does it, a strip of rows at a time: logits of full resolution are
            never held. An `mcseg.kernels.Upsampling` does it its way.

    Returns:
        A scalar, or ``(N, *spatial)`` for ``"none"``; >= 0, in the dtype of the logits or float32, whichever is wider.

    Raises:
        TypeError: Logits are not floating point, or the target is not of an integer dtype.
        ValueError: Shapes do not go together, the number of classes is not that of the offsets, the reduction or
            backend is unknown, or (CPU only) a label is neither a class nor ``ignore_index``.

    Note:
        All void gives 0 with zero gradient. A NaN logit at a labelled pixel gives NaN.

    Example:
        >>> offsets = MarginOffsets(torch.zeros(2), torch.zeros(2))
        >>> margin_calibration_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([0]), offsets)
        tensor(0.0729)
    """
    upsampling = _upsampling(upsample, target)
    _check_inputs(logits, target, offsets, upsampling)
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


#: Power Dice as arguments of `MarginCalibrationLoss`: what mcseg trains with unless it is told otherwise.
POWER_DICE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "scheme": "none",
        "margin": "soft",
        "surrogate": "sigmoid",
        "power": 0.5,
        "aggregation": "dice",
        "classes": "all",
    }
)


class MarginCalibrationLoss(Objective):
    """`margin_calibration_loss` with offsets from the pixel counts of the training labels.

    Call `calibrate` once before the first use, unless the scheme is ``"none"``. The offsets travel in the ``state_dict``, so
    a loss that loads a calibrated checkpoint needs no training labels. They stay float64 when the module is cast to another
    dtype.

    Args:
        num_classes: C >= 2.
        scheme: How counts become offsets, see `mcseg.margins.margin_offsets`.
        tau: Scale of the offsets of scheme ``"ijcv2022"``, > 0.
        upsilon: Background against foreground in ``"ijcv2022"``, > 0.
        foreground_weight: Weight >= 0 of the labelled class; None is ``num_classes``.
        ignore_index: Label of void pixels.
        reduction: ``"mean"`` over labelled pixels, ``"sum"`` or ``"none"``.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.
        max_margin: Largest offset of scheme ``"miou"``, > 0.
        margin: ``"hard"``, against the best rival class, or ``"soft"``, against all; see `mcseg.losses.family`.
        surrogate: ``"log"`` or ``"sigmoid"`` error at a margin.
        power: Of ``"sigmoid"``: q, 0 < q <= 1, of its error ``1 - (1 - sigmoid)^q``; less than 1 lets the pixels that are
            most wrong pull more, see `mcseg.losses.family`.
        aggregation: ``"sum"``, or the ratio ``"jaccard"`` or ``"dice"`` over the batch and all processes; ``"dice"`` needs
            the surrogate ``"sigmoid"``.
        weighting: Of ``"sum"``: ``"foreground"`` weighs misses with ``foreground_weight``, ``"uniform"`` with 1, ``"iou"``
            weighs both kinds of error by running confusion counts, so that their sum follows mIoU.
        false_alarm_weight: Of ``"sum"``, weight >= 0 of all false alarms.
        classes: Of the ratios: mean over the classes ``"present"`` in the batch's labels, or ``"all"``.
        smooth: Of the ratios: pixels added to numerator and denominator.
        decay: Of ``"iou"``: share of the running counts that a step keeps, 0 <= decay < 1.

    Attributes:
        foreground_offsets: Buffer, float64 ``(C,)``, NaN until calibrated (0 with scheme ``"none"``).
        background_offsets: Buffer, likewise.
        class_statistics: As of every objective. Of the ratios: ``ratio``, with its calibrated errors, ``miss_rate`` and
            ``false_alarm_rate``, see `mcseg.losses.family.ratio`; of ``"iou"``: ``running_iou``, ``miss_weight`` and
            ``false_alarm_weight``; of the others none.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> loss = MarginCalibrationLoss(num_classes=2, tau=1.0).calibrate([900, 100])
        >>> loss(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        tensor(0.0813)
    """

    foreground_offsets: Tensor
    background_offsets: Tensor
    running_shares: Tensor

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
        margin: Margin = "hard",
        surrogate: Surrogate = "log",
        aggregation: Aggregation = "sum",
        weighting: Weighting = "foreground",
        false_alarm_weight: float = 1.0,
        classes: Classes = "present",
        smooth: float = 1.0,
        decay: float = 0.95,
        power: float = 1.0,
    ) -> None:
        super().__init__(ignore_index)
        if num_classes < 2:
            raise ValueError(f"num_classes: found {num_classes}, expected at least 2: a margin needs a rival class")
        check_settings(scheme, tau, upsilon, max_margin)
        _check_choices(foreground_weight, reduction, backend)
        for name, choice, choices in (
            ("margin", margin, Margin),
            ("surrogate", surrogate, Surrogate),
            ("aggregation", aggregation, Aggregation),
            ("weighting", weighting, Weighting),
            ("classes", classes, Classes),
        ):
            check_choice(name, choice, choices)
        if aggregation != "sum" and reduction != "mean":
            raise ValueError(f"reduction: found {reduction!r}, expected 'mean': a ratio is one number for the batch")
        if aggregation == "dice" and surrogate == "log":
            raise ValueError(
                "surrogate: found 'log' with aggregation 'dice', expected 'sigmoid': log errors have no bound, so the "
                "denominator 2 n - misses + false alarms can fall to 0 and below"
            )
        for name, value in {"false_alarm_weight": false_alarm_weight, "smooth": smooth}.items():
            check_range(name, value, 0)
        if not 0 < power <= 1 or (power < 1 and surrogate == "log"):
            raise ValueError(f"power: found {power}, expected 0 < power <= 1, and 1 unless the surrogate is 'sigmoid'")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: found {decay}, expected 0 <= decay < 1")
        self.num_classes = num_classes
        self.scheme: Scheme = scheme
        self.tau = tau
        self.upsilon = upsilon
        self.foreground_weight = foreground_weight
        self.reduction: Reduction = reduction
        self.backend = backend
        self.max_margin = max_margin
        self.margin: Margin = margin
        self.surrogate: Surrogate = surrogate
        self.aggregation: Aggregation = aggregation
        self.weighting: Weighting = weighting
        self.false_alarm_weight = false_alarm_weight
        self.classes: Classes = classes
        self.smooth = smooth
        self.decay = decay
        self.power = power
        self._reset_buffers()

    @property
    def _follows_iou(self) -> bool:
        return self.aggregation == "sum" and self.weighting == "iou"

    @property
    def is_calibrated(self) -> bool:
        """Whether the offsets are known."""
        return self._calibrated

    @property
    def offsets(self) -> MarginOffsets:
        """Offsets in use; RuntimeError before calibration."""
        if not self._calibrated:
            raise RuntimeError(
                f"{type(self).__name__} is not calibrated: call loss.calibrate(class_pixels) with the pixel counts of "
                "the training labels, or load a calibrated state_dict (inside a Trainer, the data module calibrates it)"
            )
        return MarginOffsets(self.foreground_offsets, self.background_offsets)

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """The offsets, where there are such and once they are known: ``foreground_offset`` and ``background_offset``."""
        if not self._calibrated or self.scheme == "none":
            return {}
        return {"foreground_offset": self.foreground_offsets, "background_offset": self.background_offsets}

    def calibrate(self, class_pixels: ClassPixels) -> Self:
        """Set the offsets from ``(C,)`` counts of labelled training pixels per class, void excluded.

        Returns:
            The module itself.

        Raises:
            ValueError: The number of counts is not ``num_classes``, or `mcseg.margins.margin_offsets` refuses them.
        """
        offsets = margin_offsets(class_pixels, self.scheme, self.tau, self.upsilon, self.max_margin)
        if (found := len(offsets.foreground)) != self.num_classes:
            raise ValueError(f"class_pixels: found {found} counts, expected {self.num_classes}: one for each of num_classes")
        self.foreground_offsets.copy_(offsets.foreground)
        self.background_offsets.copy_(offsets.background)
        self._calibrated = True
        return self

    def forward(self, logits: Tensor, target: Tensor, upsample: bool | Upsampling = False) -> Tensor:
        """Compute the loss of ``logits (N, C, *spatial)`` against ``target (N, *spatial)``.

        With ``upsample`` from coarse logits, see `margin_calibration_loss`.

        Raises:
            RuntimeError: The loss is not calibrated.
            TypeError: As `margin_calibration_loss`, likewise ValueError.
        """
        upsampling = _upsampling(upsample, target)
        _check_inputs(logits, target, self.offsets, upsampling)
        target = target.long()  # before any comparison: uint8 would wrap an ignore_index outside 0..255
        corner = (self.margin, self.surrogate, self.aggregation, self.false_alarm_weight) == ("hard", "log", "sum", 1.0)
        if corner and self.weighting != "iou":  # the paper's, which has kernels
            total = margin_calibration_loss(
                logits,
                target,
                self.offsets,
                foreground_weight=1.0 if self.weighting == "uniform" else self.foreground_weight,
                ignore_index=self.ignore_index,
                reduction="sum" if self.reduction == "mean" else self.reduction,
                backend=self.backend,
                upsample=upsampling or False,
            )
            return self._reduced(total, target)
        kind = ErrorKind(self.margin, self.surrogate, self.power, self.ignore_index)
        if self.aggregation != "sum":
            offsets = None if self.scheme == "none" else self.offsets
            counts = error_counts(logits, target, offsets, kind, self.backend, upsampling)
            if self.surrogate == "log":  # in units in which it is 1 at the decision boundary
                counts = torch.cat([counts[:1], counts[1:] / math.log(2)])
            value, self.class_statistics = ratio(counts, self.aggregation, self.classes, self.smooth)
            return value
        weights = self._error_weights(logits, target, upsampling)
        pixels = pixel_errors(logits, target, *self.offsets, *weights, kind, self.backend, upsampling)
        if self.reduction == "none":
            return pixels
        return self._reduced(pixels.sum(), target)

    def _reduced(self, total: Tensor, target: Tensor) -> Tensor:
        return mean_over_processes(total, (target != self.ignore_index).sum()) if self.reduction == "mean" else total

    def _error_weights(self, logits: Tensor, target: Tensor, upsampling: Upsampling | None) -> tuple[Tensor, Tensor]:
        """``(C,)`` weights of misses and of false alarms."""
        if self._follows_iou:
            if self.training:
                found = confusion_shares(logits, target, self.ignore_index, upsampling)
                self.running_shares.copy_(self.decay * self.running_shares + (1 - self.decay) * found)
            misses, false_alarms = iou_weights(self.running_shares)
            false_alarms = self.false_alarm_weight * false_alarms
            self.class_statistics = {
                "running_iou": class_iou(self.running_shares),
                "miss_weight": misses,
                "false_alarm_weight": false_alarms,
            }
            return misses, false_alarms
        foreground = self.num_classes if self.foreground_weight is None else self.foreground_weight
        ones = torch.full((self.num_classes,), 1 / self.num_classes, dtype=torch.float64, device=logits.device)
        return ones * (1.0 if self.weighting == "uniform" else foreground), ones * self.false_alarm_weight

    def extra_repr(self) -> str:
        """Name the settings and whether the offsets are known."""
        return f"{super().extra_repr()}, calibrated={self._calibrated}"

    def _reset_buffers(self) -> None:
        # a flag beside the buffers: looking for NaN in them at each step would make the host wait for the device
        self._calibrated = self.scheme == "none"
        start = 0.0 if self._calibrated else torch.nan
        for name in ("foreground_offsets", "background_offsets"):
            self.register_buffer(name, torch.full((self.num_classes,), start, dtype=torch.float64))
        if self._follows_iou:
            # shares of labels, hits and predictions, see `confusion_shares`; goes on where a run is resumed
            self.register_buffer("running_shares", torch.zeros(3, self.num_classes, dtype=torch.float64))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        offsets = torch.cat([self.foreground_offsets, self.background_offsets])
        self._calibrated = not offsets.is_meta and not bool(offsets.isnan().any())


def _upsampling(upsample: bool | Upsampling, target: Tensor) -> Upsampling | None:
    """Spell out what True and False say."""
    return Upsampling(*target.shape[-2:]) if upsample is True else upsample or None


def _check_inputs(logits: Tensor, target: Tensor, offsets: MarginOffsets, upsampling: Upsampling | None) -> None:
    check_inputs(logits, target, least_classes=2, upsampling=upsampling)
    for name, offset in zip(MarginOffsets._fields, offsets, strict=True):
        if offset.shape != logits.shape[1:2]:
            raise ValueError(
                f"logits: found {logits.shape[1]} classes but {name} offsets of shape {tuple(offset.shape)}, expected "
                f"one offset per class; give the network and the loss the same number of classes"
            )


def _check_choices(foreground_weight: float | None, reduction: str, backend: str) -> None:
    if foreground_weight is not None and not (math.isfinite(foreground_weight) and foreground_weight >= 0):
        raise ValueError(
            f"foreground_weight: found {foreground_weight}, expected a finite number >= 0, or None for the number of classes"
        )
    check_choice("reduction", reduction, Reduction)
    check_backend(backend)
