r"""Objectives that are ratios of pixel counts made soft: Dice, Jaccard, Tversky, and the Lovász extension of Jaccard.

With ``p = softmax(z)`` over the classes and a power q, sums over the labelled pixels of an image or of the whole batch, each
class has the soft counts::

    n_c   pixels labelled c                          (T_c)
    A_c = sum of 1 - p_c^q over these                misses
    B_c = sum of 1 - (1 - p_c)^q over the others     false alarms

With q = 1 these are the usual ones: ``I_c = n_c - A_c = sum p_c r_c`` is the soft intersection, ``P_c = I_c + B_c = sum
p_c`` what is predicted, r the one-hot labels. Per image or batch, losses are averaged over the classes that have labelled
pixels (``"present"``) or over all; an image without labelled pixels takes no part in the mean over images. Where nothing is
labelled the loss is 0. Over the batch means over the batches of all processes: their soft counts are summed, so that a step
on several GPUs is that of one. Lovász-softmax cannot be had from sums and is taken over the batch of each process.

**Why a power.** With q = 1 the slope of a pixel's error in its logits is p (1 - p), which vanishes for the pixels that are
most wrong: a rare class that is missed everywhere stays missed. With q < 1 it is q p^q (1 - p) for a miss: the smaller q,
the more do hopeless pixels still pull, until (1 - p^q) / q becomes -log p. Errors stay within 0 and 1, so that ratios of
them stay ratios. Nor does q move the decision: with weights u of misses and v of false alarms, a pixel of two classes that
has the first one with probability h has least risk at p = 1/2 where h (u_1 + v_2) = (1 - h)(u_2 + v_1), for every q. For
one-hot labels 1 - p^q is q times the loss of Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural
Networks with Noisy Labels", NeurIPS 2018.
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

_TINY = 1e-30  # least denominator; only absent classes without smoothing come near


class RegionLoss(Objective):
    """What the objectives of regions share; a subclass turns soft counts into a loss per class.

    Args:
        per_image: Ratios per image, then their mean; False is ratios over the whole batch.
        classes: ``"present"`` or ``"all"``: which classes enter the mean.
        ignore_index: Label of void pixels.
    """

    def __init__(self, per_image: bool = False, classes: Classes = "present", ignore_index: int = 255) -> None:
        super().__init__(ignore_index)
        check_choice("classes", classes, Classes)
        self.per_image = per_image
        self.classes: Classes = classes

    def _counted(self, labelled: Tensor) -> Tensor:
        """Which classes enter the mean, from labelled pixels (G,C): G is N per image and 1 over the batch."""
        present = labelled > 0
        return present if self.classes == "present" else present.any(1, keepdim=True).expand_as(present)

    def _mean(self, losses: Tensor, labelled: Tensor) -> Tensor:
        """Average losses (G,C) over the classes that count, then over the images that have labelled pixels."""
        counted = self._counted(labelled)
        images = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
        if not self.per_image:  # of the whole batch, and of all processes
            return images.sum()
        return mean_over_processes(images.sum(), counted.any(1).sum())


class CountRatioLoss(RegionLoss):
    """A loss of regions that is a function of the soft counts of each class.

    Args:
        per_image: As of `RegionLoss`, likewise ``classes`` and ``ignore_index``.
        classes: See there.
        ignore_index: See there.
        power: q of the soft counts, 0 < q <= 1.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Attributes:
        class_statistics: Of the last batch, ``miss_rate``, A_c over the pixels of class c, and ``false_alarm_rate``, B_c
            over those of the others; NaN where there are none.
        takes_coarse_logits: True.
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
            upsample: True takes coarse logits (N,C,h,w) and upsamples them bilinearly to the target (N,H,W), with corners
                aligned as segmentation_models_pytorch does it, a strip of rows at a time: logits of full resolution are
                never held. An `mcseg.kernels.Upsampling` does it its way.

        Returns:
            Scalar >= 0 in float32, or float64 for logits of that type; 0 where nothing is labelled.

        Raises:
            TypeError: Logits are not floating point or labels not integers.
            ValueError: Shapes do not go together, or (CPU only) a label is no class.
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
    """One minus a ratio per class, with ``smooth`` >= 0 pixels added to numerator and denominator.

    Attributes:
        class_statistics: Those of `CountRatioLoss`, and ``ratio``, the mean of the images' with ``per_image``; NaN of
            classes outside the mean.
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
    r"""Soft Dice loss, with ``power`` below 1 power Dice.

    The mean over classes of one minus::

        (2 (n_c - A_c) + smooth) / (2 n_c - A_c + B_c + smooth)

    which for power 1 is ``(2 I_c + smooth) / (P_c + T_c + smooth)``. See the module `mcseg.losses.regions` for the soft
    counts and the power. After Milletari et al., "V-Net", 3DV 2016, arXiv 1606.04797, with sums of ``p`` and ``r`` in the
    denominator in place of their squares (as Drozdzal et al., 2016).

    Args:
        per_image: Ratios per image, then their mean; False is ratios over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels. ``"all"`` includes absent ones, whose loss
            ``B_c / (B_c + smooth)`` pushes false alarms down (and is constant without smoothing).
        smooth: >= 0, added to numerator and denominator.
        ignore_index: Label of void pixels.
        power: q of the soft counts, 0 < q <= 1; 1 is soft Dice, less lets the pixels that are most wrong pull more.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Raises:
        ValueError: A setting is out of its range.

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
    """Make what mcseg trains with unless it is told otherwise: power Dice over all classes, q = 1/2."""
    return DiceLoss(power=0.5, classes="all")


class JaccardLoss(SmoothedLoss):
    r"""Soft Jaccard (IoU) loss.

    The mean over classes of one minus::

        (n_c - A_c + smooth) / (n_c + B_c + smooth)

    which for power 1 is ``(I_c + smooth) / (P_c + T_c - I_c + smooth)``. See the module `mcseg.losses.regions` for the soft
    counts and the power. After Rahman and Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks for
    Image Segmentation", ISVC 2016 (there of one class, without smoothing).

    Args:
        per_image: Ratios per image, then their mean; False is ratios over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels. ``"all"`` includes absent ones, whose loss
            ``B_c / (B_c + smooth)`` pushes false alarms down (and is constant without smoothing).
        smooth: >= 0, added to numerator and denominator.
        ignore_index: Label of void pixels.
        power: q of the soft counts, 0 < q <= 1; less lets the pixels that are most wrong pull more.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Raises:
        ValueError: A setting is out of its range.

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
    r"""Soft Tversky loss, which prices false alarms and misses apart.

    The mean over classes of::

        (1 - TI_c)^(1 / gamma),    TI_c = (n_c - A_c + smooth) / (n_c - A_c + alpha B_c + beta A_c + smooth)

    See the module `mcseg.losses.regions` for the soft counts and the power. After Salehi et al., "Tversky loss function for
    image segmentation using 3D fully convolutional deep networks", MLMI 2017, arXiv 1706.05721; ``gamma`` after Abraham and
    Khan, "A Novel Focal Tversky Loss Function", ISBI 2019, arXiv 1810.07842. With alpha = beta = 0.5 it is `DiceLoss` of
    twice the ``smooth``, with alpha = beta = 1 `JaccardLoss`.

    Args:
        alpha: >= 0, price of false alarms.
        beta: >= 0, price of misses; Salehi et al. found 0.3 and 0.7 best.
        gamma: > 0; above 1 classes that are already right weigh more in comparison (their 4/3), 1 leaves it out.
        per_image: Ratios per image, then their mean; False is ratios over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` includes absent ones.
        smooth: >= 0, added to numerator and denominator.
        ignore_index: Label of void pixels.
        power: q of the soft counts, 0 < q <= 1; less lets the pixels that are most wrong pull more.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Raises:
        ValueError: A setting is out of its range.

    Note:
        For gamma other than 1 the base of the power is kept at or above the dtype's epsilon, as the power has no finite
        slope at 0: a class that is perfectly right has loss ``epsilon^(1 / gamma)`` and gradient 0.

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
    r"""Generalised Dice loss: one ratio over all classes, each weighted by its labelled pixels.

    Per image or batch::

        1 - 2 sum_c w_c (n_c - A_c) / sum_c w_c (2 n_c - A_c + B_c),    w_c = 1 / n_c^2

    See the module `mcseg.losses.regions` for the soft counts, here of power 1. After Sudre et al., "Generalised Dice
    Overlap as a Deep Learning Loss Function for Highly Unbalanced Segmentations", DLMIA 2017, arXiv 1707.03237. No
    smoothing is needed: the denominator is positive wherever anything is labelled.

    Args:
        per_image: A ratio per image, then their mean; False is one ratio over the whole batch.
        classes: A class without labelled pixels, whose weight would be infinite, has weight 0 (``"present"``) or the
            largest of the other classes' (``"all"``, as in the authors' NiftyNet).
        ignore_index: Label of void pixels.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Raises:
        ValueError: A setting is out of its range.

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
        # 0 only where nothing is labelled, and that image or batch is left out of the mean
        total = (weights * (2 * labelled - misses + alarms)).sum(1, keepdim=True)
        return (1 - 2 * overlap / total.clamp(min=_TINY)).expand_as(labelled)


class LovaszSoftmaxLoss(RegionLoss):
    r"""Lovász-softmax: the convex extension of the Jaccard loss of sets of wrong pixels, applied to soft errors.

    Per class, labelled pixels have errors ``m = 1 - p_c`` (of the class) or ``p_c`` (others). Sorted so that
    ``m_1 >= m_2 >= ...``::

        loss_c = sum_i m_i (J_i - J_{i-1}),    J_i = Jaccard loss of class c if exactly the pixels 1..i were wrong,  J_0 = 0

    After Berman et al., "The Lovász-Softmax loss", CVPR 2018, arXiv 1705.08790, algorithm 1. With several processes each
    sorts the errors of its own pixels: over the batch, the loss is not that of one process with all of them.

    Args:
        per_image: Losses per image, then their mean; False is losses over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels. ``"all"`` includes absent ones, whose loss is
            their largest error.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: A setting is out of its range.

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
        # Void pixels stay in, with error 0 and outside the class. That changes nothing: all errors are >= 0, so in
        # descending order a pixel that is not at error 0 has the same pixels before it as without them, and with that the
        # same J_i - J_{i-1}; pixels at error 0, void or not and in whatever order, contribute 0 * (J_i - J_{i-1}) = 0.
        # Nor do they have a gradient: void through the multiplication, the others as softmax is flat where p_c is 0 or 1.
        losses, labelled = [], []
        for c in range(logits.shape[1]):
            of_class, p_c = labels == c, p[:, c].reshape(shape)
            errors, order = (torch.where(of_class, 1 - p_c, p_c) * valid).sort(dim=1, descending=True)
            losses.append((errors * _jaccard_steps(of_class.gather(1, order), errors.dtype)).sum(1))
            labelled.append(of_class.sum(1))
        return self._mean(torch.stack(losses, 1), torch.stack(labelled, 1))


def _jaccard_steps(of_class: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute J_i - J_{i-1} along the last dimension, from which of the sorted pixels are of the class.

    J_i = 1 - I_i / U_i, where I_i = T minus the pixels of the class among the first i, U_i = T plus the others among them.
    A pixel of the class takes 1 from I and leaves U: the step is 1 / U_i. Another leaves I and adds 1 to U: it is
    I_i / (U_i - 1) - I_i / U_i = I_i / (U_i (U_i - 1)). Written so, nothing cancels, where a difference of two J has an
    error of the size of the step as soon as there are millions of pixels. Where T = 0, J_1 is 1 and stays.
    """
    total = of_class.sum(-1, keepdim=True)
    intersection, union = total - of_class.cumsum(-1), total + (~of_class).cumsum(-1)  # int64
    others = (intersection.to(dtype) / (union * (union - 1)).clamp(min=1).to(dtype)).where(union > 1, 1.0)
    return torch.where(of_class, 1 / union.to(dtype), others)
