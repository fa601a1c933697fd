r"""Lower bounds for the IoU of unseen images, from training margins (theory) or from a held-out set (practice).

Assumptions and proofs are in ``docs/theory/bounds.md``.

**Margin bound.** :func:`margin_bound` shows how the error on unseen images depends on pixel counts and margin offsets;
:func:`optimal_offsets` finds the offsets that make it tightest. It needs the complexity K of the networks. No useful value
is known for deep networks, so the bound explains margin calibration but guarantees nothing.

**Held-out bound.** :func:`miou_lower_bound` needs no complexity. From the pixel counts of each image of a held-out set, it
bounds the mIoU of the distribution that the images come from. The images, or groups of images, must be independent draws
from it; the pixels of an image may depend on each other in any way. The argument ``weight`` selects the quantity:

- ``"pixel"``: each pixel has the same weight. IoU = E[hits] / E[union] per class, union = target + predicted - hits. The
  mIoU of the data set estimates its mean over classes. Large images count more than small ones.
- ``"image"``: each image has the same weight. The counts of an image are divided by its number N of labelled pixels, IoU =
  E[hits / N] / E[union / N]: the IoU of a random labelled pixel of a random image. It is not the mean of the images' IoUs.

Both are equal if all images have the same number of labelled pixels. The mean is over the classes that occur in the set.
The set must not be used for training. If it was used to select one of k checkpoints, the bound of level
``1 - (1 - level) / k`` holds for the selected one with confidence ``level``.

There are two methods. ``"bootstrap"`` is tighter, and its level is approximate; ``benchmarks/results/coverage.md`` has the
measured coverage. ``"concentration"`` holds for any number of images and any distribution, and is loose, above all for rare
classes. With the weight ``"pixel"`` it needs a limit for the size of images; no such bound exists without one.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcseg.margins import ClassPixels, MarginOffsets, checked_counts

Method = Literal["bootstrap", "concentration"]
Weight = Literal["pixel", "image"]
Counts = Tensor | npt.NDArray[Any]
_Floats = npt.NDArray[np.float64]

_BETS = 2.0 ** -np.arange(12.0)
_CHUNK = 1 << 22  # numbers in memory at once: 32 MB


class MarginBound(NamedTuple):
    """Result of :func:`margin_bound`.

    Attributes:
        foreground_error: error terms e_i of misses, float64 (C,).
        background_error: error terms f_i of false alarms, float64 (C,).
        iou: lower bounds of the IoU in [0, 1], float64 (C,); NaN for a class without pixels.
        miou: mean of ``iou`` over the classes with pixels.
    """

    foreground_error: Tensor
    background_error: Tensor
    iou: Tensor
    miou: float


def margin_bound(
    class_pixels: ClassPixels,
    misses: ClassPixels,
    false_alarms: ClassPixels,
    offsets: MarginOffsets,
    complexity: float,
    delta: float = 0.05,
    unit_pixels: int = 1,
) -> MarginBound:
    r"""Bound the IoU of unseen images by the margins on the training pixels.

    With probability at least 1 - delta over the training images, simultaneously for all networks of the class::

        IoU_i >= (p_i - misses_i / N - e_i) / (p_i + false_alarms_i / N + f_i)
        e_i = sqrt(p_i / M)       (2 K / foreground_i + L)        L = sqrt(log(2 C / delta) / 2)
        f_i = sqrt((1 - p_i) / M) (2 K / background_i + L)        M = N / unit_pixels, p_i = n_i / N

    The proof is in ``docs/theory/bounds.md``, section 1.

    Args:
        class_pixels: ``(C,)`` counts n_i of labelled training pixels per class.
        misses: ``(C,)`` counts of pixels of class i with margin s_i <= foreground_i.
        false_alarms: ``(C,)`` counts of pixels of other classes with margin s_i > -background_i.
        offsets: offsets >= 0 in logit units. They may depend on the training labels, but not on the image data. The bound is
            0 for a class with an offset of 0.
        complexity: K > 0, so that the Rademacher complexity of the class margins over n pixels is at most K / sqrt(n).
        delta: probability in (0, 1) that the bound fails.
        unit_pixels: largest number of labelled pixels that may depend on each other: 1 for independent pixels, the pixels
            of an image for independent images.

    Raises:
        ValueError: the counts do not match each other, or a setting is out of range.
    """
    n = checked_counts(class_pixels)
    missed, alarmed = _check_errors(
        n, misses=misses, false_alarms=false_alarms, complexity=complexity, delta=delta, unit_pixels=unit_pixels
    )
    if (offsets.foreground < 0).any() or (offsets.background < 0).any():
        raise ValueError("offsets: found a negative offset, expected offsets >= 0")
    errors = _error_terms(n, offsets, complexity=complexity, delta=delta, unit_pixels=unit_pixels)
    iou = ((n - missed) / n.sum() - errors[0]).clamp(min=0) / ((n + alarmed) / n.sum() + errors[1])
    iou = iou.masked_fill(n == 0, torch.nan)
    return MarginBound(*errors, iou, float(iou.nanmean()))


def _check_errors(
    n: Tensor, *, misses: ClassPixels, false_alarms: ClassPixels, complexity: float, delta: float, unit_pixels: int
) -> tuple[Tensor, Tensor]:
    """Validate the arguments beside the pixel counts; return misses and false alarms as float64."""
    missed, alarmed = (torch.as_tensor(np.asarray(counts), dtype=torch.float64) for counts in (misses, false_alarms))
    total = n.sum()
    if missed.shape != n.shape or alarmed.shape != n.shape:
        raise ValueError(f"misses, false_alarms: found shapes {missed.shape}, {alarmed.shape}, expected {n.shape}")
    if (missed < 0).any() or (missed > n).any() or (alarmed < 0).any() or (alarmed > total - n).any():
        raise ValueError(
            "misses, false_alarms: found a count below 0 or above the number of pixels; expected misses of class i among "
            "its own pixels, and false alarms among the pixels of other classes"
        )
    if not complexity > 0 or not 0 < delta < 1 or not 1 <= unit_pixels <= total:
        raise ValueError(
            f"found complexity {complexity}, delta {delta}, unit_pixels {unit_pixels}; expected complexity > 0, "
            f"0 < delta < 1 and 1 <= unit_pixels <= {total:.0f}, the number of labelled pixels"
        )
    return missed, alarmed


def _error_terms(
    n: Tensor, offsets: MarginOffsets, *, complexity: float, delta: float, unit_pixels: int
) -> tuple[Tensor, Tensor]:
    """Compute the terms e and f of :func:`margin_bound`, (C,) each."""
    deviation = math.sqrt(math.log(2 * len(n) / delta) / 2)
    p, units = n / n.sum(), n.sum() / unit_pixels
    foreground = (p / units).sqrt() * (2 * complexity / offsets.foreground + deviation)
    background = ((1 - p) / units).sqrt() * (2 * complexity / offsets.background + deviation)
    return foreground, background


def optimal_offsets(
    class_pixels: ClassPixels,
    total_margin: float,
    complexity: float,
    misses: ClassPixels | None = None,
    false_alarms: ClassPixels | None = None,
    delta: float = 0.05,
    unit_pixels: int = 1,
) -> MarginOffsets:
    r"""Find the offsets with a given sum that maximise the mIoU of :func:`margin_bound`, numerically.

    Misses and false alarms are constants. If they are 0 and the error terms are small, the result is the closed form of
    scheme ``"miou"`` (:func:`mcseg.margins.margin_offsets`). Otherwise the result depends on the IoUs, and with large error
    terms the optimum sacrifices the rarest classes; see ``docs/theory/bounds.md``, section 2.

    Args:
        class_pixels: ``(C,)`` counts of labelled pixels per class, each at least 1.
        total_margin: sum of all 2 C offsets, > 0.
        complexity: see :func:`margin_bound`.
        misses: ``(C,)`` counts, see :func:`margin_bound`; None is 0.
        false_alarms: ``(C,)`` counts, see :func:`margin_bound`; None is 0.
        delta: see :func:`margin_bound`.
        unit_pixels: see :func:`margin_bound`.

    Returns:
        Offsets > 0 with the sum ``total_margin``, float64 ``(C,)``.

    Raises:
        ValueError: a class has no pixels, the counts do not match each other, or a setting is out of range.
    """
    from scipy.optimize import minimize

    n = checked_counts(class_pixels)
    if (n == 0).any():
        raise ValueError("class_pixels: found a class without pixels, expected pixels of each class; leave the class out")
    if not (math.isfinite(total_margin) and total_margin > 0):
        raise ValueError(f"total_margin: found {total_margin}, expected a finite number > 0")
    zeros = torch.zeros_like(n)
    missed, alarmed = _check_errors(
        n,
        misses=zeros if misses is None else misses,
        false_alarms=zeros if false_alarms is None else false_alarms,
        complexity=complexity,
        delta=delta,
        unit_pixels=unit_pixels,
    )
    p, a, b = n / n.sum(), missed / n.sum(), alarmed / n.sum()

    def offsets_of(free: Tensor) -> MarginOffsets:
        return MarginOffsets(*(total_margin * free.softmax(0)).chunk(2))

    def loss(free: Tensor) -> Tensor:
        e, f = _error_terms(n, offsets_of(free), complexity=complexity, delta=delta, unit_pixels=unit_pixels)
        # 1 - IoU without the subtraction: the errors can be as small as 1e-9
        return ((a + e + b + f) / (p + b + f)).mean()

    start = torch.zeros(2 * len(n), dtype=torch.float64)
    scale = float(loss(start))

    def value_and_gradient(point: _Floats) -> tuple[float, _Floats]:
        free = torch.tensor(point, requires_grad=True)
        value = loss(free) / scale
        (gradient,) = torch.autograd.grad(value, free)
        return float(value.detach()), gradient.numpy()

    options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-10}
    result = minimize(value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    return offsets_of(torch.from_numpy(result.x))


def held_out_iou(counts: Counts, weight: Weight = "pixel") -> Tensor:
    """Compute the IoU of each class on a held-out set, the quantity that :func:`miou_lower_bound` bounds.

    Args:
        counts: see :func:`miou_lower_bound`.
        weight: see :func:`miou_lower_bound`.

    Returns:
        (C,) float64 in [0, 1]; NaN for a class without target and predicted pixels.

    Raises:
        ValueError: the counts are impossible, or the weight is unknown.
    """
    hits, union, _ = _hits_and_union(counts, weight)
    return torch.from_numpy(hits.sum(0)) / torch.from_numpy(union.sum(0))


def miou_lower_bound(
    counts: Counts,
    level: float = 0.95,
    method: Method = "bootstrap",
    *,
    weight: Weight = "pixel",
    largest_pixels: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    r"""Compute a lower confidence bound for the mIoU of the distribution that a held-out set comes from.

    ``"bootstrap"`` resamples images with replacement. The bound is mIoU - t s, where t is the ``level`` quantile of the
    studentised mIoU of the resamples, and at least that of the normal distribution. The standard error s is that of the
    linearised mIoU, the mean over images j of ``sum_i (h_ji - IoU_i u_ji) / (C mean u_i)``, with hits h and union u. For a
    class in k images, ``IoU (1 - IoU) / k^2`` is added to the variance of its IoU, about the effect of one more image that
    is all hit or all missed: a class in one or two images has no measurable spread, and its IoU would count as certain.
    The coverage of BCa intervals, and of percentile intervals without very rare classes, is below their level
    (``benchmarks/results/coverage.md``).

    ``"concentration"`` is the mean of :func:`iou_lower_bounds`.

    Args:
        counts: ``(images, 3, C)`` integers on the CPU: hits, target and predicted pixels of each class among the labelled
            pixels of an image.
        level: confidence in (0, 1).
        method: ``"bootstrap"`` or ``"concentration"``.
        weight: ``"pixel"`` for the mIoU of the data set, ``"image"`` for equal weight per image, see
            :mod:`mcseg.evaluation.bounds`.
        largest_pixels: largest number of labelled pixels that an image of the distribution can have, known beforehand; the
            largest image of the set is no substitute. ``"concentration"`` with the weight ``"pixel"`` requires it, all
            other combinations refuse it.
        resamples: number of bootstrap resamples, at least 100.
        seed: seed of the bootstrap.

    Returns:
        The bound, from 0 to the mIoU of the counts; 0 if the method cannot bound it, as with a single image.

    Raises:
        ValueError: the counts are impossible, a setting is out of range, or the method does not use it.
    """
    _check_level(level)
    if method not in get_args(Method):
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(map(repr, get_args(Method)))}")
    if method == "concentration":
        return float(iou_lower_bounds(counts, level, weight, largest_pixels).nanmean())
    if largest_pixels is not None:
        raise ValueError(f"largest_pixels: found {largest_pixels}, but the bootstrap does not use it; leave it out")
    if resamples < 100:
        raise ValueError(f"resamples: found {resamples}, expected at least 100")
    hits, union, _ = _hits_and_union(counts, weight)
    return _bootstrap(hits, union, level, resamples, np.random.default_rng(seed))


def iou_lower_bounds(counts: Counts, level: float, weight: Weight = "image", largest_pixels: int | None = None) -> Tensor:
    r"""Compute lower bounds for the IoU of each class that hold simultaneously, for any number of images.

    Let h and u be the hits and the union of an image, divided by its labelled pixels (weight ``"image"``) or by
    ``largest_pixels`` (weight ``"pixel"``), so that 0 <= h <= u <= 1. If IoU = E[h] / E[u] <= v, each factor of
    ``prod_j (1 + b (h_j / v - u_j))``, with a bet b in [0, 1], is non-negative and its expectation is at most 1. The
    mean of the product over the bets 1, 1/2, 1/4, ... therefore reaches C / (1 - level) with probability at most
    (1 - level) / C (Markov). The mean falls in v, and the bound is the largest v that it refutes.

    This is the betting form of the empirical Bernstein bound of Waudby-Smith and Ramdas, "Estimating means of bounded random
    variables by betting", J. R. Stat. Soc. B 86(1):1-27, 2024, applied to a ratio. Assumptions and proof:
    ``docs/theory/bounds.md``, section 3.

    Args:
        counts: see :func:`miou_lower_bound`.
        level: joint confidence of the bounds of all classes, in (0, 1).
        weight: see :func:`miou_lower_bound`.
        largest_pixels: see :func:`miou_lower_bound`.

    Returns:
        (C,) float64, from 0 to the IoU of the counts; NaN for a class without target and predicted pixels.

    Raises:
        ValueError: see :func:`miou_lower_bound`.
    """
    _check_level(level)
    hits, union, labelled = _hits_and_union(counts, weight)
    if weight == "image" and largest_pixels is not None:
        raise ValueError(f"largest_pixels: found {largest_pixels}, but the weight 'image' does not use it; leave it out")
    if weight == "pixel":
        if largest_pixels is None:
            raise ValueError(
                "largest_pixels: found None, expected the largest number of labelled pixels that an image can have; method "
                "'concentration' requires it with the weight 'pixel'. If there is no limit, use the weight 'image'"
            )
        if labelled.max() > largest_pixels:
            raise ValueError(
                f"largest_pixels: found {largest_pixels}, but an image has {labelled.max():.0f} labelled pixels; expected "
                "the largest number that an image can have"
            )
        hits, union = hits / largest_pixels, union / largest_pixels
    threshold = math.log(hits.shape[1] / (1 - level))
    bounds = [_largest_refuted_iou(h, u, threshold) for h, u in zip(hits.T, union.T, strict=True)]
    return torch.tensor(bounds, dtype=torch.float64)


def _largest_refuted_iou(hits: _Floats, union: _Floats, threshold: float) -> float:
    """Find the largest IoU that the bets refute.

    Args:
        hits: (images,) in [0, 1].
        union: (images,) in [0, 1].
        threshold: logarithm of the evidence that refutes an IoU.
    """
    if not union.any():
        return math.nan
    present = union > 0  # an image without the class has the factor 1
    hits, union = hits[present], union[present]
    rows = max(1, _CHUNK // len(_BETS))

    def evidence(v: float) -> float:
        logarithms = sum(
            np.log1p(_BETS * (hits[start : start + rows, None] / v - union[start : start + rows, None])).sum(0)
            for start in range(0, len(hits), rows)
        )
        return float(np.logaddexp.reduce(logarithms)) - math.log(len(_BETS))

    low, high = 0.0, float(hits.sum() / union.sum())
    with np.errstate(divide="ignore"):  # log(0) of the bet 1 on an image of one class only that is all missed
        for _ in range(50):  # bisection: the evidence falls in v
            middle = (low + high) / 2
            if middle > 0 and evidence(middle) >= threshold:
                low = middle
            else:
                high = middle
    return low


def _bootstrap(hits: _Floats, union: _Floats, level: float, resamples: int, rng: np.random.Generator) -> float:
    """Compute the bootstrap bound from hits and union (images,C), see :func:`miou_lower_bound`."""
    from scipy.stats import norm

    hits, union = hits[:, union.any(0)], union[:, union.any(0)]
    images, classes = hits.shape
    if images < 2:
        return 0.0
    iou = hits.sum(0) / union.sum(0)
    miou = iou.mean()
    influence = ((hits - iou * union) / union.mean(0)).mean(1)
    # sorted by influence, so that the bound does not depend on the order of files
    order = influence.argsort(kind="stable")
    hits, union, influence = hits[order], union[order], influence[order]
    effective = union.sum(0) ** 2 / (union**2).sum(0)  # effective number of images with the class
    shrunk = (effective * iou + 1) / (effective + 2)
    variance = (influence**2).sum() / (images * (images - 1)) + (shrunk * (1 - shrunk) / effective**2).sum() / classes**2

    studentised = []
    for start in range(0, resamples, step := max(1, _CHUNK // images)):
        times = rng.multinomial(images, np.full(images, 1 / images), min(step, resamples - start)).astype(np.float64)
        studentised.append(_studentised(times, hits, union, miou))
    quantile = max(np.quantile(np.concatenate(studentised), level), norm.ppf(level))
    return float(np.clip(miou - quantile * np.sqrt(variance), 0, miou))


def _studentised(times: _Floats, hits: _Floats, union: _Floats, miou: float) -> _Floats:
    """Compute the mIoU of resamples minus that of the sample, divided by its standard error.

    Args:
        times: (R,images) number of times that each resample contains each image.
        hits: (images,C).
        union: (images,C).
        miou: mIoU of the sample.

    Returns:
        (R,) studentised mIoUs.
    """
    images = len(hits)
    hit, joint = times @ hits, times @ union  # (R,C)
    present = joint > 0
    iou = hit / np.where(present, joint, 1)
    share = present / (np.where(present, joint, 1) * present.sum(1, keepdims=True))  # of a pixel of each class in the mIoU
    influence = images * (hits @ share.T - union @ (share * iou).T)  # (images,R)
    error = np.sqrt((times.T * influence**2).sum(0) / (images * (images - 1)))
    studentised: _Floats = ((share * hit).sum(1) - miou) / np.maximum(error, 1e-9)
    return studentised


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: found {level}, expected a confidence with 0 < level < 1")


def _hits_and_union(counts: Counts, weight: Weight) -> tuple[_Floats, _Floats, _Floats]:
    """Validate counts and compute the quantities that the bounds use.

    Returns:
        Hits (images,C), union (images,C) and labelled pixels (images,); with the weight ``"image"``, hits and union are
        divided by labelled pixels.
    """
    array = np.asarray(counts)
    if array.ndim != 3 or array.shape[1] != 3 or 0 in array.shape:
        raise ValueError(f"counts: found shape {array.shape}, expected (images, 3, C): hits, target, predicted")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"counts: found dtype {array.dtype}, expected an integer dtype")
    if weight not in get_args(Weight):
        raise ValueError(f"weight: found {weight!r}, expected one of {', '.join(map(repr, get_args(Weight)))}")
    hits, target, predicted = array.astype(np.float64).transpose(1, 0, 2)
    if (hits < 0).any() or (hits > np.minimum(target, predicted)).any():
        raise ValueError(
            "counts: found hits below 0 or above the target or predicted pixels of an image; expected the order hits, "
            "target, predicted"
        )
    union, labelled = target + predicted - hits, target.sum(1)
    if (union.max(1) > labelled).any():
        image = int((union.max(1) - labelled).argmax())
        raise ValueError(
            f"counts: image {image} has {labelled[image]:.0f} target pixels, but {union[image].max():.0f} pixels in the "
            "union of one class; expected predictions counted on labelled pixels only"
        )
    if not labelled.any():
        raise ValueError("counts: found no labelled pixels, expected at least one")
    if weight == "image":
        divisor = np.maximum(labelled, 1)[:, None]  # an image without labelled pixels has hits and union 0
        hits, union = hits / divisor, union / divisor
    return hits, union, labelled
