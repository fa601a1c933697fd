"""Weighted sums of objectives, with a warm-up by cross entropy."""

import inspect
import pkgutil
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mcseg.losses.base import check_range, offered
from mcseg.losses.pixelwise import CrossEntropyLoss
from mcseg.margins import ClassPixels


class SumLoss(nn.Module):
    """Weighted sum of objectives; cross entropy alone for the first steps, if wanted.

    Let w be the share of the warm-up that is over: 0 for ``warmup_steps`` training steps, then rising to 1 over
    ``blend_steps``. The loss is ``w * sum_i weight_i loss_i + (1 - w) * cross entropy``. From scratch, a large background
    margin can silence rare classes for good; a warm-up lets them be found first.

    Args:
        num_classes: number of classes C, given to the objectives that take it.
        objectives: one mapping for each: ``class_path``, ``init_args`` (plain values, may be left out) and ``weight`` (1 if
            left out), for example ``{"class_path": "mcseg.losses.DiceLoss", "weight": 0.5}``.
        warmup_steps: training steps of cross entropy alone.
        blend_steps: training steps over which the sum takes over.
        ignore_index: label of void pixels for the cross entropy of the warm-up.

    Attributes:
        terms: values of the last call without gradient, by class name (numbered where it occurs twice), unweighted; the
            module logs them.

    Raises:
        ValueError: no objectives, a mapping with other keys, a class that cannot be found or made, a
            weight that is negative or not finite, a negative number of steps.

    Example:
        >>> import torch
        >>> from mcseg.losses import SumLoss
        >>> dice = {"class_path": "mcseg.losses.DiceLoss", "weight": 0.5}
        >>> loss = SumLoss(2, [dice, {"class_path": "mcseg.losses.CrossEntropyLoss"}])
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> loss(logits, target)
        tensor(0.3330)
        >>> loss.terms
        {'DiceLoss': tensor(0.1434), 'CrossEntropyLoss': tensor(0.2613)}
    """

    steps: Tensor

    def __init__(
        self,
        num_classes: int,
        objectives: Sequence[dict[str, Any]],
        warmup_steps: int = 0,
        blend_steps: int = 0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if not objectives:
            raise ValueError("objectives: found none, expected at least one mapping with class_path")
        if min(warmup_steps, blend_steps) < 0:
            raise ValueError(f"warmup_steps {warmup_steps}, blend_steps {blend_steps}: expected numbers >= 0")
        self.num_classes = num_classes
        self.objectives = [dict(entry) for entry in objectives]
        self.warmup_steps = warmup_steps
        self.blend_steps = blend_steps
        self.ignore_index = ignore_index
        self.weights = [float(entry.get("weight", 1.0)) for entry in self.objectives]
        for weight in self.weights:
            check_range("objectives: weight", weight, 0)
        self.parts = nn.ModuleList([_made(entry, num_classes) for entry in self.objectives])
        kinds = [type(part).__name__ for part in self.parts]
        self.names = [
            kind if kinds.count(kind) == 1 else f"{kind}{kinds[: index + 1].count(kind)}" for index, kind in enumerate(kinds)
        ]
        self.terms: dict[str, Tensor] = {}
        self.warm_up = CrossEntropyLoss(ignore_index=ignore_index) if warmup_steps + blend_steps else None
        if self.warm_up is not None:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def is_calibrated(self) -> bool:
        """Whether all objectives that want pixel counts have them."""
        return all(offered(part, "is_calibrated") for part in self.parts)

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """Constants per class of the objectives, ``(C,)`` each, as ``<objective>/<constant>``."""
        return self._of_parts("class_constants")

    @property
    def class_statistics(self) -> dict[str, Tensor]:
        """What the last call found of each class, ``(C,)`` each, as ``<objective>/<statistic>``."""
        return self._of_parts("class_statistics")

    def _of_parts(self, attribute: str) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": values
            for name, part in zip(self.names, self.parts, strict=True)
            for key, values in offered(part, attribute).items()
        }

    def calibrate(self, class_pixels: ClassPixels) -> Self:
        """Give the ``(C,)`` pixel counts of the training labels to the objectives that want them."""
        for part in self.parts:
            if (calibrate := offered(part, "calibrate")) is not None:
                calibrate(class_pixels)
        return self

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the sum for logits (N,C,H,W) and target (N,H,W)."""
        values = [cast(Tensor, part(logits, target)) for part in self.parts]
        total = torch.stack([weight * value for weight, value in zip(self.weights, values, strict=True)]).sum()
        self.terms = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        if self.warm_up is None:
            return total
        start = self.warm_up(logits, target)
        self.terms["warm-up"] = start.detach()
        over = ((self.steps - self.warmup_steps + 1) / (self.blend_steps + 1)).clamp(0, 1).to(total.dtype)
        if self.training:
            self.steps += 1
        return torch.lerp(start, total, over)


def _made(entry: dict[str, Any], num_classes: int) -> nn.Module:
    unknown = sorted(set(entry) - {"class_path", "init_args", "weight"})
    if unknown or "class_path" not in entry:
        raise ValueError(f"objectives: found the keys {sorted(entry)}, expected class_path, init_args and weight")
    path, arguments = entry["class_path"], dict(entry.get("init_args") or {})
    try:
        kind = pkgutil.resolve_name(path)
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):  # before anything is called
            raise ValueError(f"objectives: found {path}, expected a class derived from torch.nn.Module")
        if "num_classes" in inspect.signature(kind).parameters:
            arguments.setdefault("num_classes", num_classes)
        return kind(**arguments)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"objectives: {path} cannot be made ({error})") from None
