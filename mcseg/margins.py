r"""Margin offsets: the class margins that training should reach, derived from counts of labelled pixels.

Notation, for classes ``i = 0..C-1`` and ``N`` labelled (non-void) training pixels:

* ``n_i`` pixels of class ``i``, ``m_i = N - n_i`` pixels of the other classes, ``p_i = n_i / N``;
* ``s_i = z_i - max_{j != i} z_j``, the class margin of class ``i`` at a pixel with logits ``z``.

A pixel of class ``i`` should reach ``s_i >= foreground_i``, and a pixel of another class ``s_i <= -background_i``. A
*scheme* derives the offsets from the counts. Rare classes generalise worse and should get larger offsets. Scheme ``"miou"``
gives them larger foreground and background offsets; in ``"ijcv2022"`` only their background offsets are larger.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Scheme = Literal["ijcv2022", "miou", "none"]
ClassPixels = Tensor | npt.NDArray[Any] | Sequence[float]


class MarginOffsets(NamedTuple):
    """Offsets of the class margins, in logit units.

    Attributes:
        foreground: Lower limits of ``s_i`` at pixels of class ``i``, float64 ``(C,)``, >= 0.
        background: Lower limits of ``-s_i`` at pixels of other classes, float64 ``(C,)``, >= 0.
    """

    foreground: Tensor
    background: Tensor


def margin_offsets(
    class_pixels: ClassPixels,
    scheme: Scheme = "ijcv2022",
    tau: float = 10.0,
    upsilon: float = 1.0,
    max_margin: float = 1.0,
) -> MarginOffsets:
    r"""Derive foreground and background offsets from the number of training pixels per class.

    Scheme ``"ijcv2022"`` is that of Yu et al., "Distribution-Aware Margin Calibration for Semantic Segmentation in
    Images", IJCV 130(1):95-110, 2022, arXiv 2112.11554::

        background_i = tau sqrt(m_i) / n_i
        foreground_i = background_i p_i sqrt(n_i) / (upsilon m_i - p_i sqrt(m_i))

    Scheme ``"miou"`` minimises the total estimation error of the mIoU bound for a fixed sum of offsets, which determines
    their ratios (:func:`mcseg.evaluation.bounds.margin_bound`)::

        foreground_i ~ n_i^(-1/4),    background_i ~ m_i^(1/4) n_i^(-1/2),    largest offset = max_margin

    Args:
        class_pixels: ``(C,)`` counts >= 0 of labelled pixels per class, void excluded; tensor, array or sequence.
        scheme: ``"ijcv2022"``, ``"miou"``, or ``"none"`` for offsets of 0.
        tau: Scale of all offsets of ``"ijcv2022"``, > 0.
        upsilon: Weight of background against foreground in ``"ijcv2022"``, > 0; a larger value lowers the foreground
            offsets.
        max_margin: Largest offset of ``"miou"`` in logit units, > 0.

    Returns:
        Offsets in logit units, float64 ``(C,)`` on the CPU. Both offsets of a class without pixels are 0.

    Raises:
        ValueError: ``class_pixels`` does not have the form described here, fewer than two classes have pixels, a setting
            is not finite and positive, the scheme is unknown, or ``upsilon`` is so small that a foreground offset would
            be negative or infinite.

    Warns:
        UserWarning: A class has no pixels; the warning names its index.

    Note:
        The offsets of ``"ijcv2022"`` depend on the size of the data set (``background ~ 1/sqrt(N)``): with ``tau = 10``, a
        few hundred pixels give offsets above 100, and 10^9 pixels give offsets near 0. Those of ``"miou"`` do not.

    Example:
        >>> from mcseg.margins import margin_offsets
        >>> margin_offsets([900, 100], tau=1.0).background
        tensor([0.0111, 0.3000], dtype=torch.float64)
    """
    check_settings(scheme, tau, upsilon, max_margin)
    n = checked_counts(class_pixels)
    if absent := torch.nonzero(n == 0).flatten().tolist():
        warnings.warn(
            f"class_pixels: no pixels of class {_join(absent)}; its offsets are 0. Check the label mapping if the "
            "training labels should contain it.",
            stacklevel=2,
        )
    m = n.sum() - n
    if scheme == "none":
        return MarginOffsets(torch.zeros_like(n), torch.zeros_like(n))
    foreground, background = _ijcv2022(n, m, tau, upsilon) if scheme == "ijcv2022" else _miou(n, m, max_margin)
    return MarginOffsets(foreground.masked_fill(n == 0, 0.0), background.masked_fill(n == 0, 0.0))


def check_settings(scheme: str, tau: float, upsilon: float, max_margin: float) -> None:
    """Raise ValueError unless the scheme is known and the three scales are finite and positive."""
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme: found {scheme!r}, expected one of {', '.join(map(repr, get_args(Scheme)))}")
    for name, value in {"tau": tau, "upsilon": upsilon, "max_margin": max_margin}.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: found {value}, expected a finite number > 0")


def _ijcv2022(n: Tensor, m: Tensor, tau: float, upsilon: float) -> tuple[Tensor, Tensor]:
    p = n / n.sum()
    # foreground_i is positive and finite if upsilon is above this limit
    limits = p / m.sqrt()
    worst = int(limits.argmax())
    denominator = upsilon * m - p * m.sqrt()
    if upsilon <= limits[worst] or denominator[worst] <= 0:
        enough = math.ceil(float(limits[worst]) * 1e6 + 1) / 1e6  # rounded up, so that this value is valid
        raise ValueError(
            f"upsilon: found {upsilon}, which makes the foreground offset of class {worst} negative or infinite; "
            f"expected at least {enough:g} for these class_pixels"
        )
    background = tau * m.sqrt() / n
    # the n_i of background_i is cancelled, so that a class without pixels gives 0 and not 0 * inf
    foreground = tau * m.sqrt() * n.sqrt() / (n.sum() * denominator)
    return foreground, background


def _miou(n: Tensor, m: Tensor, max_margin: float) -> tuple[Tensor, Tensor]:
    foreground = n.pow(-0.25).masked_fill(n == 0, 0.0)
    background = (m.pow(0.25) * n.pow(-0.5)).masked_fill(n == 0, 0.0)
    scale = max_margin / torch.maximum(foreground.max(), background.max())
    return foreground * scale, background * scale


def checked_counts(class_pixels: ClassPixels) -> Tensor:
    """Validate counts of pixels per class and return a float64 copy ``(C,)`` on the CPU.

    Raises:
        ValueError: The counts are not at least two finite numbers that are 0 or >= 1, or fewer than two are positive.
    """
    if isinstance(class_pixels, Tensor):
        class_pixels = class_pixels.detach().cpu().numpy()
    try:
        n = torch.from_numpy(np.array(class_pixels, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"class_pixels: found {class_pixels!r}, expected one number of pixels per class") from error
    if n.ndim != 1:
        raise ValueError(f"class_pixels: found shape {tuple(n.shape)}, expected (C,), one number of pixels per class")
    if len(n) < 2:
        raise ValueError(f"class_pixels: found {len(n)} class(es), expected at least 2")
    if bad := torch.nonzero(~n.isfinite() | (n < 0)).flatten().tolist():
        raise ValueError(f"class_pixels: found {float(n[bad[0]]):g} for class {_join(bad)}, expected finite counts >= 0")
    if shares := torch.nonzero((n > 0) & (n < 1)).flatten().tolist():
        raise ValueError(
            f"class_pixels: found {float(n[shares[0]]):g} for class {_join(shares)}, expected counts, not shares; "
            "multiply the shares by the number of labelled pixels"
        )
    present = torch.nonzero(n).flatten().tolist()
    if len(present) < 2:
        found = f"pixels of class {present[0]} only" if present else "no pixels"
        raise ValueError(
            f"class_pixels: found {found}, expected pixels of at least two classes; check the label mapping and "
            "that void pixels are not counted"
        )
    return n


def _join(indices: list[int]) -> str:
    return ", ".join(map(str, indices))
