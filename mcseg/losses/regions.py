r"""Objectives that are ratios of pixel counts made soft: Dice, Jaccard, Tversky, and the Lovász extension of Jaccard.

With ``p = softmax(z)`` over the classes, ``r_c`` 1 where the label is class ``c`` and 0 elsewhere, sums over the labelled
pixels of an image or of the whole batch, each class has the soft counts::

    I_c = sum p_c r_c   (intersection),      P_c = sum p_c   (predicted),      T_c = sum r_c   (labelled)

Per image or batch, losses are averaged over the classes that have labelled pixels (``"present"``) or over all; an image
without labelled pixels takes no part in the mean over images. Where nothing is labelled the loss is 0. Over the batch means
over the batches of all processes: their soft counts are summed, so that a step on several GPUs is that of one.
Lovász-softmax cannot be had from sums and is taken over the batch of each process.
"""

import torch
from torch import Tensor

from mcseg.losses.base import Objective, check_choice, check_range, mean_over_processes, summed_over_processes
from mcseg.losses.family import Classes

_TINY = 1e-30  # least denominator; only absent classes without smoothing come near


class RegionLoss(Objective):
    """What the objectives of regions share; a subclass turns soft counts into a loss per class.

    Args:
        per_image: Ratios per image, then their mean; False is ratios over the whole batch.
        classes: ``"present"`` or ``"all"``: which classes enter the mean.
        ignore_index: Label of void pixels.

    Attributes:
        class_statistics: ``miss_rate``, 1 - I_c / T_c, and ``false_alarm_rate``, P_c - I_c over the pixels of the other
            classes, of the last batch; Lovász-softmax has none.
    """

    def __init__(self, per_image: bool = False, classes: Classes = "present", ignore_index: int = 255) -> None:
        super().__init__(ignore_index)
        check_choice("classes", classes, Classes)
        self.per_image = per_image
        self.classes: Classes = classes

    def _loss(self, logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
        counts = self._soft_counts(logits, target, labelled)
        hits, predicted, labels = (t.detach().sum(0) for t in counts)
        self.class_statistics = {
            "miss_rate": (labels - hits) / labels,
            "false_alarm_rate": (predicted - hits) / (labels.sum() - labels),
        }
        return self._mean(self._class_losses(*counts), counts[2])

    def _class_losses(self, intersection: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        """Compute losses (G,C) from soft counts, each (G,C): G is N per image and 1 over the batch."""
        raise NotImplementedError

    def _soft_counts(self, logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute I, P and T, each (G,C) in the dtype of the logits."""
        # Void is masked by multiplication. Its label becomes 0 and `valid`, which is False there, is written as r_0.
        valid = valid[:, None]
        labels = target[:, None].masked_fill(~valid, 0)
        of_class = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels, valid)
        p = logits.softmax(1) * valid
        intersection, predicted, labelled = (_image_sums(t) for t in (p * of_class, p, of_class))
        counts = torch.stack([intersection, predicted, labelled.to(logits.dtype)])  # (3, N, C)
        if not self.per_image:
            counts = summed_over_processes(counts.sum(1, keepdim=True))
        intersection, predicted, labelled = counts.unbind()
        return intersection, predicted, labelled

    def _mean(self, losses: Tensor, labelled: Tensor) -> Tensor:
        """Average losses (G,C) over the classes that count, then over the images that have labelled pixels."""
        counted = labelled > 0
        if self.classes == "all":
            counted = counted.any(1, keepdim=True).expand_as(losses)
        images = (losses * counted).sum(1) / counted.sum(1).clamp(min=1)
        if not self.per_image:  # of the whole batch, and of all processes
            return images.sum()
        return mean_over_processes(images.sum(), counted.any(1).sum())


class SmoothedLoss(RegionLoss):
    """A loss of regions with ``smooth`` >= 0 pixels added to numerator and denominator; the rest as `RegionLoss`."""

    def __init__(
        self, per_image: bool = False, classes: Classes = "present", smooth: float = 1.0, ignore_index: int = 255
    ) -> None:
        super().__init__(per_image, classes, ignore_index)
        check_range("smooth", smooth, 0)
        self.smooth = smooth


class DiceLoss(SmoothedLoss):
    r"""Soft Dice loss.

    The mean over classes of::

        1 - (2 I_c + smooth) / (P_c + T_c + smooth)

    See the module `mcseg.losses.regions` for the soft counts. After Milletari et al., "V-Net", 3DV 2016, arXiv 1606.04797,
    with sums of ``p`` and ``r`` in the denominator in place of their squares (as Drozdzal et al., 2016).

    Args:
        per_image: Ratios per image, then their mean; False is ratios over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels. ``"all"`` includes absent ones, whose loss
            ``P_c / (P_c + smooth)`` pushes false alarms down (and is constant without smoothing).
        smooth: >= 0, added to numerator and denominator.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: A setting is out of its range.
    """

    def _class_losses(self, intersection: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        return 1 - (2 * intersection + self.smooth) / (predicted + labelled + self.smooth).clamp(min=_TINY)


class JaccardLoss(SmoothedLoss):
    r"""Soft Jaccard (IoU) loss.

    The mean over classes of::

        1 - (I_c + smooth) / (P_c + T_c - I_c + smooth)

    See the module `mcseg.losses.regions` for the soft counts. After Rahman and Wang, "Optimizing Intersection-Over-Union in
    Deep Neural Networks for Image Segmentation", ISVC 2016 (there of one class, without smoothing).

    Args:
        per_image: Ratios per image, then their mean; False is ratios over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels. ``"all"`` includes absent ones, whose loss
            ``P_c / (P_c + smooth)`` pushes false alarms down (and is constant without smoothing).
        smooth: >= 0, added to numerator and denominator.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: A setting is out of its range.
    """

    def _class_losses(self, intersection: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        union = predicted + labelled - intersection
        return 1 - (intersection + self.smooth) / (union + self.smooth).clamp(min=_TINY)


class TverskyLoss(SmoothedLoss):
    r"""Soft Tversky loss, which prices false alarms and misses apart.

    The mean over classes of::

        (1 - TI_c)^(1 / gamma),    TI_c = (I_c + smooth) / (I_c + alpha (P_c - I_c) + beta (T_c - I_c) + smooth)

    See the module `mcseg.losses.regions` for the soft counts. After Salehi et al., "Tversky loss function for image
    segmentation using 3D fully convolutional deep networks", MLMI 2017, arXiv 1706.05721; ``gamma`` after Abraham
    and Khan, "A Novel Focal Tversky Loss Function", ISBI 2019, arXiv 1810.07842. With alpha = beta = 0.5 it is
    `DiceLoss` of twice the ``smooth``, with alpha = beta = 1 `JaccardLoss`.

    Args:
        alpha: >= 0, price of false alarms.
        beta: >= 0, price of misses; Salehi et al. found 0.3 and 0.7 best.
        gamma: > 0; above 1 classes that are already right weigh more in comparison (their 4/3), 1 leaves it out.
        per_image: Ratios per image, then their mean; False is ratios over the whole batch.
        classes: ``"present"`` averages over classes with labelled pixels, ``"all"`` includes absent ones.
        smooth: >= 0, added to numerator and denominator.
        ignore_index: Label of void pixels.

    Raises:
        ValueError: A setting is out of its range.

    Note:
        For gamma other than 1 the base of the power is kept at or above the dtype's epsilon, as the power has no finite
        slope at 0: a class that is perfectly right has loss ``epsilon^(1 / gamma)`` and gradient 0.
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
    ) -> None:
        super().__init__(per_image, classes, smooth, ignore_index)
        check_range("alpha", alpha, 0)
        check_range("beta", beta, 0)
        check_range("gamma", gamma, 0, open_=True)
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    def _class_losses(self, intersection: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        errors = self.alpha * (predicted - intersection) + self.beta * (labelled - intersection)
        losses = 1 - (intersection + self.smooth) / (intersection + errors + self.smooth).clamp(min=_TINY)
        if self.gamma == 1:
            return losses
        return losses.clamp(min=torch.finfo(losses.dtype).eps) ** (1 / self.gamma)


class GeneralizedDiceLoss(RegionLoss):
    r"""Generalised Dice loss: one ratio over all classes, each weighted by its labelled pixels.

    Per image or batch::

        1 - 2 sum_c w_c I_c / sum_c w_c (P_c + T_c),    w_c = 1 / T_c^2

    See the module `mcseg.losses.regions` for the soft counts. After Sudre et al., "Generalised Dice Overlap as a Deep
    Learning Loss Function for Highly Unbalanced Segmentations", DLMIA 2017, arXiv 1707.03237. No smoothing is
    needed: the denominator is positive wherever anything is labelled.

    Args:
        per_image: A ratio per image, then their mean; False is one ratio over the whole batch.
        classes: A class without labelled pixels, whose weight would be infinite, has weight 0 (``"present"``) or the
            largest of the other classes' (``"all"``, as in the authors' NiftyNet).
        ignore_index: Label of void pixels.

    Raises:
        ValueError: A setting is out of its range.
    """

    def _class_losses(self, intersection: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
        present = labelled > 0
        weights = labelled.clamp(min=1) ** -2 * present
        if self.classes == "all":
            weights = weights.where(present, weights.amax(1, keepdim=True))
        overlap = (weights * intersection).sum(1, keepdim=True)
        # 0 only where nothing is labelled, and that image or batch is left out of the mean
        total = (weights * (predicted + labelled)).sum(1, keepdim=True)
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


def _image_sums(values: Tensor) -> Tensor:
    """Sum (N,C,*spatial) over space."""
    return values.sum(tuple(range(2, values.ndim))) if values.ndim > 2 else values
