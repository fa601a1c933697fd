"""Weighted sums of objectives, with an optional warm-up by cross entropy."""

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
    """Weighted sum of objectives, with an optional warm-up by cross entropy.

    The loss is::

        w * sum_i weight_i loss_i + (1 - w) * cross entropy

    where w is 0 for the first ``warmup_steps`` training steps and then rises linearly to 1 over ``blend_steps``. In
    training from scratch, large background offsets can suppress rare classes permanently; a warm-up avoids this.

    Args:
        num_classes: Number of classes C, passed to each objective that has this argument.
        objectives: One mapping per objective with ``class_path``, optional ``init_args`` (plain values) and an optional
            ``weight`` (default 1), for example ``{"class_path": "mcseg.losses.DiceLoss", "weight": 0.5}``.
        warmup_steps: Training steps with cross entropy only, >= 0.
        blend_steps: Training steps of the transition to the sum, >= 0.
        ignore_index: Label of void pixels for the cross entropy of the warm-up.

    Attributes:
        terms: Unweighted losses of the last call without gradient, by class name; a name that occurs more than once is
            numbered. The module logs them.

    Raises:
        ValueError: There are no objectives, a mapping has other keys, a class cannot be imported or built, a weight is
            negative or not finite, or a number of steps is negative.

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
        check_range("warmup_steps", warmup_steps, 0)
        check_range("blend_steps", blend_steps, 0)
        self.num_classes = num_classes
        self.objectives = [dict(entry) for entry in objectives]
        self.warmup_steps = warmup_steps
        self.blend_steps = blend_steps
        self.ignore_index = ignore_index
        self.weights = [float(entry.get("weight", 1.0)) for entry in self.objectives]
        for weight in self.weights:
            check_range("objectives: weight", weight, 0)
        self.parts = nn.ModuleList([_build(entry, num_classes) for entry in self.objectives])
        classes = [type(part).__name__ for part in self.parts]
        self.names = [
            name if classes.count(name) == 1 else f"{name}{classes[: index + 1].count(name)}"
            for index, name in enumerate(classes)
        ]
        self.terms: dict[str, Tensor] = {}
        self.warm_up = CrossEntropyLoss(ignore_index=ignore_index) if warmup_steps + blend_steps else None
        if self.warm_up is not None:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def is_calibrated(self) -> bool:
        """Whether all objectives are calibrated."""
        return all(offered(part, "is_calibrated") for part in self.parts)

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """Constants per class of the objectives, ``(C,)`` each, named ``<objective>/<constant>``."""
        return self._collect("class_constants")

    @property
    def class_statistics(self) -> dict[str, Tensor]:
        """Statistics per class of the last call, ``(C,)`` each, named ``<objective>/<statistic>``."""
        return self._collect("class_statistics")

    def _collect(self, attribute: str) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": values
            for name, part in zip(self.names, self.parts, strict=True)
            for key, values in offered(part, attribute).items()
        }

    def calibrate(self, class_pixels: ClassPixels) -> Self:
        """Calibrate the objectives that have a method ``calibrate`` with ``(C,)`` pixel counts of the training labels."""
        for part in self.parts:
            if (calibrate := offered(part, "calibrate")) is not None:
                calibrate(class_pixels)
        return self

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the sum.

        Args:
            logits: (N,C,H,W) floating point, unbounded scores.
            target: (N,H,W) integers, 0..C-1 or the objectives' ``ignore_index``.

        Returns:
            Scalar; the errors are those of the objectives.
        """
        values = [cast(Tensor, part(logits, target)) for part in self.parts]
        total = torch.stack([weight * value for weight, value in zip(self.weights, values, strict=True)]).sum()
        self.terms = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        if self.warm_up is None:
            return total
        cross_entropy = self.warm_up(logits, target)
        self.terms["warm-up"] = cross_entropy.detach()
        share = ((self.steps - self.warmup_steps + 1) / (self.blend_steps + 1)).clamp(0, 1).to(total.dtype)
        if self.training:
            self.steps += 1
        return torch.lerp(cross_entropy, total, share)


def _build(entry: dict[str, Any], num_classes: int) -> nn.Module:
    unknown = sorted(set(entry) - {"class_path", "init_args", "weight"})
    if unknown or "class_path" not in entry:
        raise ValueError(
            f"objectives: found the keys {sorted(entry)}, expected class_path and, optionally, init_args and weight"
        )
    path, arguments = entry["class_path"], dict(entry.get("init_args") or {})
    try:
        cls = pkgutil.resolve_name(path)
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):  # checked before it is called
            raise ValueError(f"objectives: found {path}, expected a class derived from torch.nn.Module")
        if "num_classes" in inspect.signature(cls).parameters:
            arguments.setdefault("num_classes", num_classes)
        return cls(**arguments)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"objectives: cannot build {path} ({error}); check its class_path and init_args") from None
