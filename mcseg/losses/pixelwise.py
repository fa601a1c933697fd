"""Objectives that are a mean over pixels: cross entropy and its variants."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.losses.base import CountedLoss, Objective, check_choice, check_range, mean_over_processes
from mcseg.margins import ClassPixels

Weighting = Literal["none", "inverse", "median_frequency", "effective_number", "enet"]


class CrossEntropyLoss(CountedLoss):
    r"""Cross entropy, with optional class weights.

    With ``p = softmax(z)`` over the classes, label ``y`` and the smoothed one-hot label
    ``t_k = (1 - label_smoothing) [k = y] + label_smoothing / C``, the loss is that of `torch.nn.CrossEntropyLoss`::

        - sum over labelled pixels of sum_k w_k t_k log p_k  /  sum over labelled pixels of w_y

    but 0, not NaN, if nothing is labelled. The class weights ``w`` are those of ``weight``, or follow from the counts
    ``n_c``, ``N = sum n_c``:

    * ``"none"``: ``weight``, or 1 for each class; needs no counts and has no method ``calibrate``.
    * ``"inverse"``: ``1 / n_c``, scaled to mean 1.
    * ``"median_frequency"``: ``median(f) / f_c``, ``f_c = n_c / N``, after Eigen and Fergus, ICCV 2015, arXiv 1411.4734.
      In the paper, N counts the pixels of the images that contain the class; here it counts all labelled pixels.
    * ``"effective_number"``: ``(1 - beta) / (1 - beta^n_c)``, scaled to mean 1; Cui et al., "Class-Balanced Loss Based on
      Effective Number of Samples", CVPR 2019, arXiv 1901.05555.
    * ``"enet"``: ``1 / ln(enet_c + n_c / N)``; Paszke et al., "ENet", 2016, arXiv 1606.02147.

    A class without pixels has weight 0 and does not enter the mean or the median.

    Args:
        num_classes: C >= 2; None accepts any number and needs ``weighting="none"``.
        weighting: ``"none"``, ``"inverse"``, ``"median_frequency"``, ``"effective_number"`` or ``"enet"``.
        beta: Parameter of ``"effective_number"``, 0 <= beta < 1. With 0 all weights are equal; towards 1 they approach
            ``"inverse"``. Classes with many more than ``1 / (1 - beta)`` pixels have equal weights.
        enet_c: Parameter of ``"enet"``, > 1. Weights lie between ``1 / ln(enet_c + 1)`` and ``1 / ln(enet_c)``.
        label_smoothing: Amount of label smoothing, 0..1; Szegedy et al., CVPR 2016.
        ignore_index: Label of void pixels.
        weight: Weight of each class, C finite numbers >= 0 that are not all 0; list or tensor. Needs
            ``weighting="none"``. The mean divides by the sum of the pixels' weights, as in `torch.nn.CrossEntropyLoss`.

    Attributes:
        class_terms: Class weights, float64 ``(C,)``, NaN until calibrated; absent with ``weighting="none"``.

    Raises:
        ValueError: A setting is out of range, or both ``weight`` and ``weighting`` are given; when called, ``weight`` has
            another number of entries than there are classes.

    Example:
        >>> import torch
        >>> from mcseg.losses import CrossEntropyLoss
        >>> CrossEntropyLoss()(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        tensor(0.0486)
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> CrossEntropyLoss(weight=[1.0, 3.0])(logits, target)
        tensor(0.3677)
    """

    class_weight: Tensor
    weight: list[float] | None = None

    _term = "weight"
    _absent = "its weight is 0"

    def __init__(
        self,
        num_classes: int | None = None,
        weighting: Weighting = "none",
        beta: float = 0.999999,
        enet_c: float = 1.02,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
        weight: Sequence[float] | Tensor | None = None,
    ) -> None:
        if hasattr(num_classes, "__len__"):  # torch's first argument is the weight
            raise ValueError(f"num_classes: found {num_classes!r}, expected a number; give class weights as weight=[...]")
        check_choice("weighting", weighting, Weighting)
        if not 0 <= beta < 1:
            raise ValueError(f"beta: found {beta}, expected a number >= 0 and < 1")
        check_range("enet_c", enet_c, 1, open_=True)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: found {label_smoothing}, expected a number between 0 and 1")
        super().__init__(num_classes, ignore_index, counted=weighting != "none")
        self.weight = _checked_weights("weight", weight)
        if self.weight is not None:
            if weighting != "none":
                raise ValueError(f"found weight and weighting {weighting!r}, expected one of them; remove the other")
            _check_length("weight", self.weight, len(self.weight) if num_classes is None else num_classes)
        self._reset_buffers()
        self.weighting: Weighting = weighting
        self.beta = beta
        self.enet_c = enet_c
        self.label_smoothing = label_smoothing

    def _loss(self, logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
        weights: Tensor | None = None
        if self.weight is not None:
            weights = _weights_for("weight", self.class_weight, logits)
        elif self._counted:
            weights = self._terms_for(logits)
        total = F.cross_entropy(
            logits,
            target,
            weights,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        if weights is None:
            return mean_over_processes(total, labelled.sum())
        return mean_over_processes(total, (weights[target.masked_fill(~labelled, 0)] * labelled).sum())

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """The weight of each class, ``(C,)``; empty without weights and before calibration."""
        return super().class_constants if self.weight is None else {self._term: self.class_weight}

    @property
    def calibrate(self) -> Callable[[ClassPixels], Self]:
        """Method that sets the weights from pixel counts; absent with ``weighting="none"``, so labels are not counted."""
        if not self._counted:
            raise AttributeError("calibrate")
        return super().calibrate

    def _terms(self, n: Tensor) -> Tensor:
        present = n > 0
        if self.weighting == "inverse":
            weights = 1 / n
        elif self.weighting == "median_frequency":
            weights = n[present].quantile(0.5) / n  # N cancels
        elif self.weighting == "effective_number":
            log_beta = math.log(self.beta) if self.beta > 0 else -math.inf
            weights = (1 - self.beta) / -torch.expm1(n * log_beta)  # 1 - beta^n without cancellation
        else:
            weights = 1 / (self.enet_c + n / n.sum()).log()
        if self.weighting in ("inverse", "effective_number"):
            weights = weights / weights[present].mean()
        return weights.where(present, 0.0)

    def _reset_buffers(self) -> None:
        super()._reset_buffers()
        if self.weight is not None:
            self.register_buffer("class_weight", torch.tensor(self.weight, dtype=torch.float64), persistent=False)


class FocalLoss(Objective):
    r"""Focal loss in its softmax form: cross entropy that down-weights well-classified pixels.

    With ``p = softmax(z)`` over the classes and label ``y``, the loss is the mean over labelled pixels of::

        - alpha_y (1 - p_y)^gamma log p_y

    After Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002, eq. 5. The paper uses a sigmoid
    for two classes and divides by the number of foreground anchors.

    Args:
        gamma: Exponent >= 0; 0 gives cross entropy, weighted by ``alpha`` or ``weight``.
        alpha: C class weights >= 0; None is 1 for each class. The mean divides by the number of labelled pixels, not
            by the sum of their weights.
        ignore_index: Label of void pixels.
        weight: Class weights instead of ``alpha``, C finite numbers >= 0 that are not all 0; list or tensor. The mean
            divides by the sum of the pixels' weights, as in `CrossEntropyLoss`.

    Raises:
        ValueError: A setting is out of range, or both ``alpha`` and ``weight`` are given; when called, the number of weights
            is not that of the classes.

    Example:
        >>> import torch
        >>> from mcseg.losses import FocalLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> FocalLoss(gamma=2.0)(logits, target)
        tensor(0.0338)
    """

    class_weight: Tensor

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: Sequence[float] | Tensor | None = None,
        ignore_index: int = 255,
        weight: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__(ignore_index)
        check_range("gamma", gamma, 0)
        self.gamma = gamma
        self.alpha = _checked_weights("alpha", alpha)
        self.weight = _checked_weights("weight", weight)
        if self.alpha is not None and self.weight is not None:
            raise ValueError("found alpha and weight, expected one of them; remove the other")
        self._reset_buffers()

    def _loss(self, logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
        labels = target.masked_fill(~labelled, 0)
        log_p = logits.log_softmax(1)
        pixels = -log_p.gather(1, labels[:, None])[:, 0]
        if self.gamma > 0:
            # Compute 1 - p_y as the sum of the other p_k, to avoid cancellation. If this sum underflows to 0, the gradient
            # of its power is infinite for gamma < 1. Clamp the sum, as the loss is 0 there.
            others = log_p.exp().scatter(1, labels[:, None], 0.0).sum(1)
            pixels = others.clamp(min=torch.finfo(others.dtype).tiny) ** self.gamma * pixels
        number = labelled
        if self.alpha is not None or self.weight is not None:
            name = "alpha" if self.weight is None else "weight"
            weights = _weights_for(name, self.class_weight, logits)[labels]
            pixels = weights * pixels
            number = labelled if self.weight is None else weights * labelled
        return mean_over_processes((pixels * labelled).sum(), number.sum())

    def _reset_buffers(self) -> None:
        weights = self.alpha if self.weight is None else self.weight
        if weights is not None:
            self.register_buffer("class_weight", torch.tensor(weights, dtype=torch.float64), persistent=False)


class LogitAdjustmentLoss(CountedLoss):
    r"""Cross entropy of logits that are shifted by the log prior of their class.

    With counts ``n_c`` and ``N = sum n_c``, the loss is the mean over labelled pixels of::

        - log softmax(z + tau log pi)_y,    pi_c = n_c / N

    Predictions use ``z`` without the shift, so the loss favours rare classes, and more so for larger ``tau``. Source: Menon
    et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314, eq. 10.

    Args:
        num_classes: C >= 2.
        tau: Scale of the shift, >= 0; 0 is cross entropy, 1 is consistent for balanced accuracy.
        ignore_index: Label of void pixels.

    Attributes:
        class_terms: ``tau log pi``, float64 ``(C,)``, NaN until calibrated. A class without pixels counts as one pixel, so
            that its term is finite.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> from mcseg.losses import LogitAdjustmentLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> LogitAdjustmentLoss(num_classes=2).calibrate([900, 100])(logits, target)
        tensor(0.9355)
    """

    _term = "adjustment"
    _absent = "it counts as a class with one pixel"

    def __init__(self, num_classes: int, tau: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__(num_classes, ignore_index)
        check_range("tau", tau, 0)
        self.tau = tau

    def _loss(self, logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
        shift = self._terms_for(logits).view(-1, *[1] * (logits.ndim - 2))
        total = F.cross_entropy(logits + shift, target, ignore_index=self.ignore_index, reduction="sum")
        return mean_over_processes(total, labelled.sum())

    def _terms(self, n: Tensor) -> Tensor:
        return self.tau * (n.clamp(min=1) / n.sum()).log()


class BalancedSoftmaxLoss(LogitAdjustmentLoss):
    r"""Cross entropy of the balanced softmax, which weights each class by its count: `LogitAdjustmentLoss` with tau 1.

    The loss is the mean over labelled pixels of::

        - log( n_y exp(z_y) / sum_k n_k exp(z_k) )

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, arXiv 2007.10740.

    Args:
        num_classes: C >= 2.
        ignore_index: Label of void pixels.

    Example:
        >>> import torch
        >>> from mcseg.losses import BalancedSoftmaxLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> BalancedSoftmaxLoss(num_classes=2).calibrate([900, 100])(logits, target)
        tensor(0.9355)
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__(num_classes, 1.0, ignore_index)


class LDAMLoss(CountedLoss):
    r"""Cross entropy with a margin for the labelled class (LDAM); rare classes have larger margins.

    The loss is the mean over labelled pixels of::

        - log softmax(scale u)_y,    u_y = z_y - margin_y,    u_k = z_k for k != y
        margin_c = max_margin (n_c / min_k n_k)^(-1/4)

    After Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019,
    arXiv 1906.07413. In the paper, logits are cosines, and the authors' code scales them by 30. The logits of a
    segmentation network are unbounded, so the default scale is 1. The paper's second stage, deferred re-weighting (DRW),
    is not included.

    Args:
        num_classes: C >= 2.
        max_margin: Margin of the rarest class in logit units, > 0.
        scale: Factor of the logits, > 0.
        ignore_index: Label of void pixels.

    Attributes:
        class_terms: Margins, float64 ``(C,)``, NaN until calibrated. A class without pixels has margin 0.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> from mcseg.losses import LDAMLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> LDAMLoss(num_classes=2).calibrate([900, 100])(logits, target)
        tensor(0.3787)
    """

    _term = "margin"
    _absent = "its margin is 0"

    def __init__(self, num_classes: int, max_margin: float = 0.5, scale: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__(num_classes, ignore_index)
        check_range("max_margin", max_margin, 0, open_=True)
        check_range("scale", scale, 0, open_=True)
        self.max_margin = max_margin
        self.scale = scale

    def _loss(self, logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
        labels = target.masked_fill(~labelled, 0)
        margins = self._terms_for(logits)[labels]
        logits = self.scale * logits.scatter_add(1, labels[:, None], -margins[:, None])
        total = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="sum")
        return mean_over_processes(total, labelled.sum())

    def _terms(self, n: Tensor) -> Tensor:
        present = n > 0
        return (self.max_margin * (n / n[present].min()) ** -0.25).where(present, 0.0)


def _checked_weights(name: str, weights: Sequence[float] | Tensor | None) -> list[float] | None:
    """Return class weights as a list. Raises ValueError unless they are finite numbers >= 0 and not all 0."""
    if weights is None:
        return None
    values = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if values.ndim != 1:
        raise ValueError(f"{name}: found shape {tuple(values.shape)}, expected a list of numbers, one per class")
    numbers: list[float] = values.tolist()
    for number in numbers:
        check_range(name, number, 0)
    if not any(numbers):
        raise ValueError(f"{name}: found only zeros, expected at least one weight > 0")
    return numbers


def _check_length(name: str, weights: Sequence[float] | Tensor, classes: int) -> None:
    if len(weights) != classes:
        raise ValueError(f"{name}: found {len(weights)} weights, expected {classes}, one per class")


def _weights_for(name: str, weights: Tensor, logits: Tensor) -> Tensor:
    """Return class weights ``(C,)`` in the dtype and on the device of the logits. Raises ValueError for another C."""
    _check_length(name, weights, logits.shape[1])
    return weights.to(logits.dtype).to(logits.device)
