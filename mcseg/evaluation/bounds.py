r"""Lower bounds for the IoU of unseen images: from training margins (theory), and from a held-out set (to rely on).

**Margin bound.** :func:`margin_bound` says how the error on unseen images depends on pixel counts and margin offsets, and
:func:`optimal_offsets` which offsets make it tightest. Statement, assumptions and proof: ``docs/theory/bounds.md``.
The bound needs the complexity K of the networks, of which no useful value is known for deep ones: it explains and promises
nothing.

**Held-out bound.** :func:`miou_lower_bound` needs no complexity: it takes the counts of a held-out set, image by image, and
bounds the mIoU over endless images of the same source. The images (or groups of them) are taken to be drawn independently
from that source. Pixels of an image may depend on each other in any way. Two quantities can be bounded, by ``weight``:

- ``"pixel"``: every pixel weighs the same. IoU = E[hits] / E[union] per class, union = target + predicted - hits. The mIoU
  of the data set estimates their mean. Large images weigh more than small ones.
- ``"image"``: every image weighs the same. The counts of an image are divided by its labelled pixels N first, IoU =
  E[hits / N] / E[union / N]: the IoU of a pixel that is drawn from the labelled pixels of an image that is drawn first. It
  is not the mean of IoUs of single images.

Both are the same if all images have as many labelled pixels. The mean is taken over the classes that occur in the set. The
set must not have been used for training; if it chose one of k checkpoints, the bound of level ``1 - (1 - level) / k`` holds
for the chosen one at ``level``.

Two methods: ``bootstrap`` is the closer one, and its level is approximate (measured: ``benchmarks/results/coverage.md``).
``concentration`` holds for any number of images and any source, and is loose, above all for rare classes; with the weight
``"pixel"`` it needs a limit for the size of images, without which no such bound exists (``bounds.md``, section 3).
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
_CHUNK = 1 << 22  # numbers that a step of the computations holds at once: 32 MB


class MarginBound(NamedTuple):
    """What :func:`margin_bound` gives; per class float64 (C,).

    Attributes:
        foreground_error: e_i, by which the miss rate of unseen pixels may exceed the training margin error.
        background_error: f_i, likewise for false alarms.
        iou: lower bound of the IoU, in [0, 1]; NaN for a class without pixels.
        miou: mean of the others.
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
    r"""Bound the IoU of unseen images by the margins that a network reaches on its training pixels (``bounds.md``).

    With probability at least 1 - delta over the training images, for all networks of the class at once::

        IoU_i >= (p_i - misses_i / N - e_i) / (p_i + false_alarms_i / N + f_i)
        e_i = sqrt(p_i / M)       (2 K / foreground_i + L)        L = sqrt(log(2 C / delta) / 2)
        f_i = sqrt((1 - p_i) / M) (2 K / background_i + L)        M = N / unit_pixels, p_i = n_i / N

    Args:
        class_pixels: ``(C,)`` labelled training pixels n_i per class.
        misses: ``(C,)`` pixels of class i with margin s_i <= foreground_i.
        false_alarms: ``(C,)`` pixels of other classes with margin s_i > -background_i.
        offsets: >= 0, chosen before the images were seen; from their label counts is allowed. An offset of 0 bounds nothing.
        complexity: K > 0: the Rademacher complexity of the class margins over n pixels is at most K / sqrt(n).
        delta: probability in (0, 1) with which the bound may fail.
        unit_pixels: most labelled pixels that may depend on each other: 1 for independent pixels, the pixels of an image for
            independent images.

    Raises:
        ValueError: counts that do not fit each other, or a setting out of its range.
    """
    n = checked_counts(class_pixels)
    missed, alarmed = _checked(n, misses, false_alarms, complexity, delta, unit_pixels)
    if (offsets.foreground < 0).any() or (offsets.background < 0).any():
        raise ValueError("offsets: found a negative one; expected margins >= 0")
    errors = _error_terms(n, offsets, complexity, delta, unit_pixels)
    iou = ((n - missed) / n.sum() - errors[0]).clamp(min=0) / ((n + alarmed) / n.sum() + errors[1])
    iou = iou.masked_fill(n == 0, torch.nan)
    return MarginBound(*errors, iou, float(iou.nanmean()))


def _checked(
    n: Tensor, misses: ClassPixels, false_alarms: ClassPixels, complexity: float, delta: float, unit_pixels: int
) -> tuple[Tensor, Tensor]:
    """Validate what is given beside the pixel counts; return margin errors as float64."""
    missed, alarmed = (torch.as_tensor(np.asarray(counts), dtype=torch.float64) for counts in (misses, false_alarms))
    total = n.sum()
    if missed.shape != n.shape or alarmed.shape != n.shape:
        raise ValueError(f"misses, false_alarms: found shapes {missed.shape}, {alarmed.shape}, expected {n.shape}")
    if (missed < 0).any() or (missed > n).any() or (alarmed < 0).any() or (alarmed > total - n).any():
        raise ValueError("misses, false_alarms: found more than there are pixels of the class (of the others), or negative")
    if not complexity > 0 or not 0 < delta < 1 or not 1 <= unit_pixels <= total:
        raise ValueError(
            f"found complexity {complexity}, delta {delta}, unit_pixels {unit_pixels}; expected a complexity > 0, a delta "
            "between 0 and 1, and 1 to all labelled pixels in a unit"
        )
    return missed, alarmed


def _error_terms(
    n: Tensor, offsets: MarginOffsets, complexity: float, delta: float, unit_pixels: int
) -> tuple[Tensor, Tensor]:
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
    r"""Find the offsets of a given sum that maximise the mIoU of :func:`margin_bound`, numerically.

    The margin errors are held at the given counts. Without errors, and where the error terms are small, the answer is the
    closed form of the scheme ``miou`` (:func:`mcseg.margins.margin_offsets`). With errors, the IoUs enter; where the error
    terms are large, the rarest classes are given up: see ``bounds.md``.

    Args:
        class_pixels: ``(C,)`` labelled pixels per class, each at least 1.
        total_margin: > 0, sum of all 2 C offsets.
        complexity: as for :func:`margin_bound`.
        misses: ``(C,)`` margin errors of the foreground; None is 0.
        false_alarms: ``(C,)`` margin errors of the background; None is 0.
        delta: as for :func:`margin_bound`.
        unit_pixels: as for :func:`margin_bound`.

    Returns:
        Offsets > 0 whose sum is ``total_margin``.
    """
    from scipy.optimize import minimize

    n = checked_counts(class_pixels)
    if (n == 0).any():
        raise ValueError("class_pixels: found a class without pixels; leave it out, no offset helps it")
    if not (math.isfinite(total_margin) and total_margin > 0):
        raise ValueError(f"total_margin: found {total_margin}, expected a finite number > 0")
    nothing = torch.zeros_like(n)
    missed, alarmed = _checked(
        n,
        nothing if misses is None else misses,
        nothing if false_alarms is None else false_alarms,
        complexity,
        delta,
        unit_pixels,
    )
    p, a, b = n / n.sum(), missed / n.sum(), alarmed / n.sum()

    def shared(free: Tensor) -> MarginOffsets:
        return MarginOffsets(*(total_margin * free.softmax(0)).chunk(2))

    def loss(free: Tensor) -> Tensor:
        e, f = _error_terms(n, shared(free), complexity, delta, unit_pixels)
        # 1 - IoU, written without the difference: the errors may be 1e-9 of it
        return ((a + e + b + f) / (p + b + f)).mean()

    start = torch.zeros(2 * len(n), dtype=torch.float64)
    scale = float(loss(start))

    def value_and_gradient(point: _Floats) -> tuple[float, _Floats]:
        free = torch.tensor(point, requires_grad=True)
        value = loss(free) / scale
        (gradient,) = torch.autograd.grad(value, free)
        return float(value.detach()), gradient.numpy()

    options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(value_and_gradient, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    return shared(torch.from_numpy(found.x))


def held_out_iou(counts: Counts, weight: Weight = "pixel") -> Tensor:
    """Compute the IoU of every class on a held-out set, by the weight of :func:`miou_lower_bound`.

    Args:
        counts: as for :func:`miou_lower_bound`.
        weight: as for :func:`miou_lower_bound`.

    Returns:
        (C,) float64 in [0, 1]; NaN for a class with neither target nor predicted pixels.
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
    r"""Bound the mIoU of the source of a held-out set from below, with confidence ``level``.

    ``bootstrap``: images are drawn again with replacement, and the bound is mIoU - t s, with t the ``level`` quantile of
    the studentised mIoU of the resamples, at least that of the normal distribution. The standard error s is that of the
    linearised mIoU, the mean over images j of ``sum_i (h_ji - IoU_i u_ji) / (C mean u_i)``, u = target + predicted - h.
    A class in k images has ``IoU (1 - IoU) / k^2`` added to the variance of its IoU, about what one more image that is all
    hit or all missed would do: a class in one or two images shows no spread of its own, and would be taken for certain.
    BCa intervals, and percentile ones where no class is very rare, hold less often than they say
    (``benchmarks/results/coverage.md``).

    ``concentration``: the mean of :func:`iou_lower_bounds`.

    Args:
        counts: ``(images, 3, C)`` integers on the CPU: hits, target and predicted pixels of each class, labelled ones only.
        level: confidence in (0, 1).
        method: ``"bootstrap"`` or ``"concentration"``.
        weight: ``"pixel"`` for the mIoU of the data set, ``"image"`` for equal weight per image; see the module.
        largest_pixels: for ``concentration`` with the weight ``"pixel"`` only, and needed there: the most labelled pixels
            that an image of the source can have, known beforehand. The largest image of the set is no substitute.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The bound, in [0, mIoU of the counts]; 0 where the method cannot tell, as from a single image.

    Raises:
        ValueError: counts that are impossible, a setting out of its range, or one that the method does not use.
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
    r"""Bound the IoU of every class from below, all at once with confidence ``level``, for any number of images.

    Let h and u be the hits and the union of an image, divided by its labelled pixels (weight ``"image"``) or by
    ``largest_pixels`` (weight ``"pixel"``): 0 <= h <= u <= 1. If the source has IoU = E[h] / E[u] <= v, then each factor of
    ``prod_j (1 + b (h_j / v - u_j))``, with a bet b in [0, 1], is never negative and has an expectation of at most 1. The
    mean of the product over the bets 1, 1/2, 1/4, ... therefore reaches C / (1 - level) with probability at most
    (1 - level) / C (Markov), and the bound is the largest v that it refutes: it falls in v. This is the betting form of the
    empirical Bernstein bound (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", J. R.
    Stat. Soc. B 86(1):1-27, 2024), with one inequality for the ratio. Assumptions and proof: ``bounds.md``, section 3.

    Args:
        counts: as for :func:`miou_lower_bound`.
        level: confidence in (0, 1).
        weight: as for :func:`miou_lower_bound`.
        largest_pixels: as for :func:`miou_lower_bound`.

    Returns:
        (C,) float64 in [0, IoU]; NaN for a class with neither target nor predicted pixels.

    Raises:
        ValueError: as for :func:`miou_lower_bound`.
    """
    _check_level(level)
    hits, union, labelled = _hits_and_union(counts, weight)
    if weight == "image" and largest_pixels is not None:
        raise ValueError(f"largest_pixels: found {largest_pixels}, but the weight 'image' does not use it; leave it out")
    if weight == "pixel":
        if largest_pixels is None:
            raise ValueError(
                "largest_pixels: found None, expected the most labelled pixels that an image of the source can have, which "
                "this bound needs with the weight 'pixel'; if no limit is known, choose the weight 'image'"
            )
        if labelled.max() > largest_pixels:
            raise ValueError(
                f"largest_pixels: found {largest_pixels}, but an image has {labelled.max():.0f} labelled pixels"
            )
        hits, union = hits / largest_pixels, union / largest_pixels
    needed = math.log(hits.shape[1] / (1 - level))
    return torch.tensor([_refuted(h, u, needed) for h, u in zip(hits.T, union.T, strict=True)], dtype=torch.float64)


def _refuted(hits: _Floats, union: _Floats, needed: float) -> float:
    """Find the largest IoU that the bets refute; hits and union (images,) in [0, 1]."""
    if not union.any():
        return math.nan
    there = union > 0  # the others have factors 1
    hits, union = hits[there], union[there]
    rows = max(1, _CHUNK // len(_BETS))

    def evidence(v: float) -> float:
        logarithms = sum(
            np.log1p(_BETS * (hits[start : start + rows, None] / v - union[start : start + rows, None])).sum(0)
            for start in range(0, len(hits), rows)
        )
        return float(np.logaddexp.reduce(logarithms)) - math.log(len(_BETS))

    low, high = 0.0, float(hits.sum() / union.sum())
    with np.errstate(divide="ignore"):  # an image all of one class and all missed: the bet of 1 is lost for good
        for _ in range(50):  # evidence falls in v
            middle = (low + high) / 2
            if middle > 0 and evidence(middle) >= needed:
                low = middle
            else:
                high = middle
    return low


def _bootstrap(hits: _Floats, union: _Floats, level: float, resamples: int, rng: np.random.Generator) -> float:
    from scipy.stats import norm

    hits, union = hits[:, union.any(0)], union[:, union.any(0)]
    images, classes = hits.shape
    if images < 2:
        return 0.0
    iou = hits.sum(0) / union.sum(0)
    miou = iou.mean()
    influence = ((hits - iou * union) / union.mean(0)).mean(1)
    # Images in the order of their influence: the bound does not depend on the order of files.
    order = influence.argsort(kind="stable")
    hits, union, influence = hits[order], union[order], influence[order]
    seen = union.sum(0) ** 2 / (union**2).sum(0)  # effective number of images with the class
    shrunk = (seen * iou + 1) / (seen + 2)
    variance = (influence**2).sum() / (images * (images - 1)) + (shrunk * (1 - shrunk) / seen**2).sum() / classes**2

    studentised = []
    for start in range(0, resamples, step := max(1, _CHUNK // images)):
        times = rng.multinomial(images, np.full(images, 1 / images), min(step, resamples - start)).astype(np.float64)
        studentised.append(_studentised(times, hits, union, miou))
    quantile = max(np.quantile(np.concatenate(studentised), level), norm.ppf(level))
    return float(np.clip(miou - quantile * np.sqrt(variance), 0, miou))


def _studentised(times: _Floats, hits: _Floats, union: _Floats, miou: float) -> _Floats:
    """MIoU of resamples (R,) less that of the sample, over its standard error; times (R,images): how often each is in."""
    images = len(hits)
    hit, joint = times @ hits, times @ union  # (R,C)
    there = joint > 0
    iou = hit / np.where(there, joint, 1)
    share = there / (np.where(there, joint, 1) * there.sum(1, keepdims=True))  # of a pixel of each class in the mIoU
    influence = images * (hits @ share.T - union @ (share * iou).T)  # (images,R)
    error = np.sqrt((times.T * influence**2).sum(0) / (images * (images - 1)))
    studentised: _Floats = ((share * hit).sum(1) - miou) / np.maximum(error, 1e-9)
    return studentised


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: found {level}, expected a confidence between 0 and 1")


def _hits_and_union(counts: Counts, weight: Weight) -> tuple[_Floats, _Floats, _Floats]:
    """Validate counts; return hits and union (images,C), divided by labelled pixels if images weigh the same, and those."""
    found = np.asarray(counts)
    if found.ndim != 3 or found.shape[1] != 3 or 0 in found.shape:
        raise ValueError(f"counts: found shape {found.shape}, expected (images, 3, C): hits, target, predicted")
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"counts: found {found.dtype}, expected integers")
    if weight not in get_args(Weight):
        raise ValueError(f"weight: found {weight!r}, expected one of {', '.join(map(repr, get_args(Weight)))}")
    hits, target, predicted = found.astype(np.float64).transpose(1, 0, 2)
    if (hits < 0).any() or (hits > np.minimum(target, predicted)).any():
        raise ValueError("counts: found hits below 0 or above the target or predicted pixels of an image")
    union, labelled = target + predicted - hits, target.sum(1)
    if (union.max(1) > labelled).any():
        image = int((union.max(1) - labelled).argmax())
        raise ValueError(
            f"counts: image {image} has {labelled[image]:.0f} target pixels in all, but {union[image].max():.0f} that are "
            "target or predicted of one class; expected predictions to be counted on labelled pixels only"
        )
    if not labelled.any():
        raise ValueError("counts: found no labelled pixel at all")
    if weight == "image":
        whole = np.maximum(labelled, 1)[:, None]  # an image without labelled pixels adds 0 to both
        hits, union = hits / whole, union / whole
    return hits, union, labelled
