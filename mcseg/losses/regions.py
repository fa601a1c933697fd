r"""Objectives on regions: ratios of soft pixel counts (Dice, Jaccard, Tversky), and the Lovász extension of Jaccard.

Let ``p = softmax(z)`` over the classes, and q the power. The soft counts of class c, over the labelled pixels of an image or
of the whole batch, are::

    n_c   number of pixels labelled c                          (T_c)
    A_c = sum of 1 - p_c^q over these pixels                   misses
    B_c = sum of 1 - (1 - p_c)^q over the other pixels         false alarms

With q = 1 these are the usual soft counts: ``n_c - A_c = I_c`` is the soft intersection, the sum of ``p_c`` over the pixels
labelled c, and ``I_c + B_c = P_c`` is the sum of ``p_c`` over all labelled pixels.

The loss is the mean over the classes with labelled pixels (``"present"``), or over all classes (``"all"``). With
``per_image`` it is then averaged over the images with labelled pixels. It is 0 if nothing is labelled.

Over the batch, soft counts are summed over all processes, so a step on several GPUs equals a step on one GPU with all
images. Lovász-softmax does not depend on sums only; each process computes it on its own batch.

**Why a power.** With q = 1 the gradient of a pixel's error with respect to its logits is proportional to ``p (1 - p)``. It
vanishes for the pixels that are most wrong, so a rare class that is missed everywhere stays missed. With q < 1 the gradient
of a miss is proportional to ``q p^q (1 - p)``, which decays more slowly for small p; in the limit q -> 0,
``(1 - p^q) / q`` is ``-log p``. The errors stay in [0, 1], so the ratios stay valid.

The power does not move the decision. Take two classes, weights u of misses and v of false alarms, and a pixel of class 1
with probability h: its risk is least at p = 1/2 if ``h (u_1 + v_2) = (1 - h)(u_2 + v_1)``, for every q.

For one-hot labels, ``1 - p^q`` is q times the loss of Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep
Neural Networks with Noisy Labels", NeurIPS 2018.
"""

from typing import Literal

import torch
from torch import Tensor

from mcseg.kernels import Upsampling, check_backend, soft_counts
from mcseg.losses.base import (
    Objective,
    as_upsampling,
    check_choice,
    check_inputs,
    check_range,
    mean_over_processes,
    summed_over_processes,
)

Classes = Literal["present", "all"]

_TINY = 1e-30  # lower limit of denominators; only absent classes without smoothing reach it


class RegionLoss(Objective):
    """Base class of the objectives on regions: the mean over classes and images.

    Args:
        per_image: Whether to compute the loss per image and average it, or over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` over all classes.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, per_image: bool = False, classes: Classes = "present", ignore_index: int = 255) -> None:
        super().__init__(ignore_index)
        check_choice("classes", classes, Classes)
        self.per_image = per_image
        self.classes: Classes = classes

    def _counted(self, labelled: Tensor) -> Tensor:
        """Select the classes that enter the mean.

        Args:
            labelled: (G,C) labelled pixels per class; G is N with ``per_image``, else 1.

        Returns:
            (G,C) bool.
        """
        present = labelled > 0
        return present if self.classes == "present" else present.any(1, keepdim=True).expand_as(present)

    def _mean(self, losses: Tensor, labelled: Tensor) -> Tensor:
        """Average losses (G,C) over the selected classes, then over the images with labelled pixels."""
        counted = self._counted(labelled)
        images = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
        if not self.per_image:
            return images.sum()  # a single value, for the whole batch
        return mean_over_processes(images.sum(), counted.any(1).sum())


class CountRatioLoss(RegionLoss):
    """Base class of losses that are a function of the soft counts of each class, see `mcseg.losses.regions`.

    A subclass computes a loss per class in ``_class_losses``.

    Args:
        per_image: Whether to compute the loss per image and average it, or over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` over all classes.
        ignore_index: Label of void pixels.
        power: Power q of the soft counts, 0 < q <= 1.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Attributes:
        class_statistics: ``miss_rate``, A_c divided by the pixels labelled c, and ``false_alarm_rate``, B_c divided by the
            pixels of the other classes, ``(C,)`` each; NaN if there are no such pixels in the last batch.
        takes_coarse_logits: True.

    Raises:
        ValueError: A setting is out of range.
    """

    takes_coarse_logits = True

    def __init__(
        self,
        per_image: bool = False,
        classes: Classes = "present",
        ignore_index: int = 255,
        power: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(per_image, classes, ignore_index)
        if not 0 < power <= 1:
            raise ValueError(f"power: found {power}, expected 0 < power <= 1")
        check_backend(backend)
        self.power = power
        self.backend = backend

    def forward(self, logits: Tensor, target: Tensor, upsample: bool | Upsampling = False) -> Tensor:
        """Compute the loss.

        Args:
            logits: (N,C,*spatial) floating point, unbounded scores.
            target: (N,*spatial) integers, 0..C-1 or ``ignore_index``.
            upsample: True takes coarse logits (N,C,h,w) and upsamples them bilinearly to the target (N,H,W), with aligned
                corners as in segmentation_models_pytorch. It works on a strip of rows at a time, so the logits of full
                resolution never take memory. An `mcseg.kernels.Upsampling` sets size and alignment.

        Returns:
            Scalar >= 0 in float32, or in float64 for float64 logits; 0 if nothing is labelled.

        Raises:
            TypeError: Logits are not floating point, or the target is not of an integer dtype.
            ValueError: Shapes do not match, or (CPU only) a label is neither a class nor ``ignore_index``.
        """
        upsampling = as_upsampling(upsample, target)
        check_inputs(logits, target, upsampling=upsampling)
        labelled, misses, alarms = self._soft_counts(logits, target, upsampling).unbind()
        n, a, b = (counts.detach().sum(0) for counts in (labelled, misses, alarms))
        self.class_statistics = {"miss_rate": a / n, "false_alarm_rate": b / (n.sum() - n)}
        return self._mean(self._class_losses(labelled, misses, alarms), labelled)

    def _class_losses(self, labelled: Tensor, misses: Tensor, alarms: Tensor) -> Tensor:
        """Compute losses (G,C) from soft counts, each (G,C)."""
        raise NotImplementedError

    def _soft_counts(self, logits: Tensor, target: Tensor, upsampling: Upsampling | None) -> Tensor:
        """Count labels, misses and false alarms, (3,G,C)."""
        groups = [slice(n, n + 1) for n in range(len(logits))] if self.per_image else [slice(None)]
        counts = [
            soft_counts(
                logits[group],
                target[group],
                power=self.power,
                ignore_index=self.ignore_index,
                backend=self.backend,
                upsampling=upsampling,
            )
            for group in groups
        ]
        if not counts:
            return logits.new_zeros((3, 0, logits.shape[1])) * logits.sum()
        return torch.stack(counts, 1) if self.per_image else summed_over_processes(counts[0])[:, None]


class SmoothedLoss(CountRatioLoss):
    """Base class of losses that are one minus a smoothed ratio per class.

    A subclass computes the ratios in ``_ratios``.

    Args:
        per_image: Whether to compute ratios per image and average them, or over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` over all classes.
        smooth: Number of pixels >= 0 that is added to numerator and denominator.
        ignore_index: Label of void pixels.
        power: Power q of the soft counts, 0 < q <= 1.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Attributes:
        class_statistics: Those of `CountRatioLoss`, and ``ratio``, with ``per_image`` its mean over the images; NaN for
            classes that do not enter the mean of the loss.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        per_image: bool = False,
        classes: Classes = "present",
        smooth: float = 1.0,
        ignore_index: int = 255,
        power: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(per_image, classes, ignore_index, power, backend)
        check_range("smooth", smooth, 0)
        self.smooth = smooth

    def _class_losses(self, labelled: Tensor, misses: Tensor, alarms: Tensor) -> Tensor:
        ratios = self._ratios(labelled, misses, alarms)
        counted = self._counted(labelled)
        self.class_statistics["ratio"] = (ratios.detach() * counted).sum(0) / counted.sum(0)
        return 1 - ratios

    def _ratios(self, labelled: Tensor, misses: Tensor, alarms: Tensor) -> Tensor:
        """Compute ratios (G,C) from soft counts, each (G,C)."""
        raise NotImplementedError


class DiceLoss(SmoothedLoss):
    r"""Soft Dice loss, or power Dice with ``power`` < 1.

    The loss is the mean over classes of one minus::

        (2 (n_c - A_c) + smooth) / (2 n_c - A_c + B_c + smooth)

    With power 1 this is ``(2 I_c + smooth) / (P_c + T_c + smooth)``. See `mcseg.losses.regions` for the soft counts and the
    power. After Milletari et al., "V-Net", 3DV 2016, arXiv 1606.04797; the denominator sums probabilities and labels
    instead of their squares, as in Drozdzal et al., 2016.

    Args:
        per_image: Whether to compute ratios per image and average them, or over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` over all classes. The loss of an absent
            class is ``B_c / (B_c + smooth)``: it penalises false alarms, and is constant without smoothing.
        smooth: Number of pixels >= 0 that is added to numerator and denominator.
        ignore_index: Label of void pixels.
        power: Power q of the soft counts, 0 < q <= 1. 1 is soft Dice; a smaller power gives larger gradients to the pixels
            that are most wrong.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> from mcseg.losses import DiceLoss
        >>> loss = DiceLoss(power=0.5, classes="all")
        >>> loss(torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1]))
        tensor(0.0787)
    """

    def _ratios(self, labelled: Tensor, misses: Tensor, alarms: Tensor) -> Tensor:
        total = (2 * labelled - misses + alarms + self.smooth).clamp(min=_TINY)
        return (2 * (labelled - misses) + self.smooth) / total


def default_objective() -> DiceLoss:
    """Create the default objective: power Dice over all classes with q = 1/2."""
    return DiceLoss(power=0.5, classes="all")


class JaccardLoss(SmoothedLoss):
    r"""Soft Jaccard (IoU) loss.

    The loss is the mean over classes of one minus::

        (n_c - A_c + smooth) / (n_c + B_c + smooth)

    With power 1 this is ``(I_c + smooth) / (P_c + T_c - I_c + smooth)``. See `mcseg.losses.regions` for the soft counts and
    the power. After Rahman and Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation",
    ISVC 2016, which has one class and no smoothing.

    Args:
        per_image: Whether to compute ratios per image and average them, or over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` over all classes. The loss of an absent
            class is ``B_c / (B_c + smooth)``: it penalises false alarms, and is constant without smoothing.
        smooth: Number of pixels >= 0 that is added to numerator and denominator.
        ignore_index: Label of void pixels.
        power: Power q of the soft counts, 0 < q <= 1; a smaller power gives larger gradients to the pixels that are most
            wrong.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> from mcseg.losses import JaccardLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> JaccardLoss()(logits, target)
        tensor(0.1932)
    """

    def _ratios(self, labelled: Tensor, misses: Tensor, alarms: Tensor) -> Tensor:
        return (labelled - misses + self.smooth) / (labelled + alarms + self.smooth).clamp(min=_TINY)


class TverskyLoss(SmoothedLoss):
    r"""Soft Tversky loss, with separate weights for false alarms and misses.

    The loss is the mean over classes of::

        (1 - TI_c)^(1 / gamma),    TI_c = (n_c - A_c + smooth) / (n_c - A_c + alpha B_c + beta A_c + smooth)

    See `mcseg.losses.regions` for the soft counts and the power. With alpha = beta = 0.5 it is `DiceLoss` with twice the
    ``smooth``, with alpha = beta = 1 it is `JaccardLoss`. Sources: Salehi et al., "Tversky loss function for image
    segmentation using 3D fully convolutional deep networks", MLMI 2017, arXiv 1706.05721; for ``gamma``, Abraham and Khan,
    "A Novel Focal Tversky Loss Function", ISBI 2019, arXiv 1810.07842.

    Args:
        alpha: Weight of false alarms, >= 0.
        beta: Weight of misses, >= 0; Salehi et al. recommend alpha = 0.3, beta = 0.7.
        gamma: Focal exponent, > 0. Above 1, classes that are almost right get more relative weight; Abraham and Khan use
            4/3. 1 has no effect.
        per_image: Whether to compute ratios per image and average them, or over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` over all classes.
        smooth: Number of pixels >= 0 that is added to numerator and denominator.
        ignore_index: Label of void pixels.
        power: Power q of the soft counts, 0 < q <= 1; a smaller power gives larger gradients to the pixels that are most
            wrong.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Raises:
        ValueError: A setting is out of range.

    Note:
        For gamma other than 1, ``1 - TI_c`` is clamped to the dtype's epsilon, as the slope of its power can be infinite at
        0. A class that is exactly right has the loss ``epsilon^(1 / gamma)`` and gradient 0.

    Example:
        >>> import torch
        >>> from mcseg.losses import TverskyLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> TverskyLoss(alpha=0.3, beta=0.7)(logits, target)
        tensor(0.1081)
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 1.0,
        per_image: bool = False,
        classes: Classes = "present",
        smooth: float = 1.0,
        ignore_index: int = 255,
        power: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(per_image, classes, smooth, ignore_index, power, backend)
        check_range("alpha", alpha, 0)
        check_range("beta", beta, 0)
        check_range("gamma", gamma, 0, open_=True)
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    def _ratios(self, labelled: Tensor, misses: Tensor, alarms: Tensor) -> Tensor:
        hits = labelled - misses
        errors = self.alpha * alarms + self.beta * misses
        return (hits + self.smooth) / (hits + errors + self.smooth).clamp(min=_TINY)

    def _class_losses(self, labelled: Tensor, misses: Tensor, alarms: Tensor) -> Tensor:
        losses = super()._class_losses(labelled, misses, alarms)
        if self.gamma == 1:
            return losses
        return losses.clamp(min=torch.finfo(losses.dtype).eps) ** (1 / self.gamma)


class GeneralizedDiceLoss(CountRatioLoss):
    r"""Generalised Dice loss: one ratio over all classes, with weights from their labelled pixels.

    The loss of an image or of the batch is::

        1 - 2 sum_c w_c (n_c - A_c) / sum_c w_c (2 n_c - A_c + B_c),    w_c = 1 / n_c^2

    See `mcseg.losses.regions` for the soft counts; the power is 1. No smoothing is needed, as the denominator is positive
    if anything is labelled. Source: Sudre et al., "Generalised Dice Overlap as a Deep Learning Loss Function for Highly
    Unbalanced Segmentations", DLMIA 2017, arXiv 1707.03237.

    Args:
        per_image: Whether to compute the loss per image and average it, or over the whole batch.
        classes: Weight of a class without labelled pixels, where ``1 / n_c^2`` is infinite: 0 with ``"present"``, the
            largest weight of a present class with ``"all"``, as in the authors' NiftyNet.
        ignore_index: Label of void pixels.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> from mcseg.losses import GeneralizedDiceLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> GeneralizedDiceLoss()(logits, target)
        tensor(0.2125)
    """

    def __init__(
        self,
        per_image: bool = False,
        classes: Classes = "present",
        ignore_index: int = 255,
        backend: str = "auto",
    ) -> None:
        super().__init__(per_image, classes, ignore_index, backend=backend)

    def _class_losses(self, labelled: Tensor, misses: Tensor, alarms: Tensor) -> Tensor:
        present = labelled > 0
        weights = labelled.clamp(min=1) ** -2 * present
        if self.classes == "all":
            weights = weights.where(present, weights.amax(1, keepdim=True))
        overlap = (weights * (labelled - misses)).sum(1, keepdim=True)
        # 0 only if nothing is labelled, and the mean leaves out such an image or batch
        total = (weights * (2 * labelled - misses + alarms)).sum(1, keepdim=True)
        return (1 - 2 * overlap / total.clamp(min=_TINY)).expand_as(labelled)


class LovaszSoftmaxLoss(RegionLoss):
    r"""Lovász-softmax loss: the Lovász extension of the Jaccard loss, applied to the pixels' softmax errors.

    For class c, the error ``m`` of a labelled pixel is ``1 - p_c`` if its label is c, else ``p_c``. With the errors sorted,
    ``m_1 >= m_2 >= ...``, the loss of the class is::

        sum_i m_i (J_i - J_{i-1}),    J_i = Jaccard loss of class c if exactly the pixels 1..i are wrong,    J_0 = 0

    Source: Berman et al., "The Lovász-Softmax loss", CVPR 2018, arXiv 1705.08790, algorithm 1. Each process sorts the
    errors of its own batch, so the loss of several processes differs from that of one process with all images.

    Args:
        per_image: Whether to compute the loss per image and average it, or over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` over all classes. The loss of an absent
            class is its largest error.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> from mcseg.losses import LovaszSoftmaxLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> LovaszSoftmaxLoss()(logits, target)
        tensor(0.2950)
    """

    def _loss(self, logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        groups = logits.shape[0] if self.per_image else 1
        shape = (groups, target.numel() // max(groups, 1))
        p = logits.softmax(1)
        valid, labels = valid.reshape(shape), target.masked_fill(~valid, -1).reshape(shape)
        # Void pixels stay in, with error 0 and a label that is no class. They change nothing: in descending order they
        # come after every pixel with a positive error, so its J_i - J_{i-1} is the same as without them. A pixel with
        # error 0, void or not, adds 0 * (J_i - J_{i-1}) = 0. Its gradient is 0 as well: for void pixels through the
        # multiplication, for labelled ones because softmax is flat at p_c = 0 and p_c = 1.
        losses, labelled = [], []
        for c in range(logits.shape[1]):
            of_class, p_c = labels == c, p[:, c].reshape(shape)
            errors, order = (torch.where(of_class, 1 - p_c, p_c) * valid).sort(dim=1, descending=True)
            losses.append((errors * _jaccard_steps(of_class.gather(1, order), errors.dtype)).sum(1))
            labelled.append(of_class.sum(1))
        return self._mean(torch.stack(losses, 1), torch.stack(labelled, 1))


def _jaccard_steps(of_class: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute J_i - J_{i-1} along the last dimension.

    With T pixels of the class, J_i = 1 - I_i / U_i. I_i is T minus the pixels of the class among the first i, and U_i is T
    plus the other pixels among them. A pixel of the class lowers I by 1, so its step is 1 / U_i. Any other pixel raises U by
    1, so its step is I_i / (U_i - 1) - I_i / U_i = I_i / (U_i (U_i - 1)). These forms do not cancel; with millions of
    pixels, the rounding error of J_i - J_{i-1} is as large as the step. If T = 0, the first step is 1 and all others are 0.

    Args:
        of_class: (...,P) bool, whether the pixels, sorted by descending error, are labelled with the class.
        dtype: dtype of the result.
    """
    total = of_class.sum(-1, keepdim=True)
    intersection, union = total - of_class.cumsum(-1), total + (~of_class).cumsum(-1)  # int64
    others = (intersection.to(dtype) / (union * (union - 1)).clamp(min=1).to(dtype)).where(union > 1, 1.0)
    return torch.where(of_class, 1 / union.to(dtype), others)
