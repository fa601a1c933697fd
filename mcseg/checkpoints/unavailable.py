"""Placeholders for the objective, optimiser and scheduler of a checkpoint whose classes no longer exist.

Labelling images needs none of the three. Training does, and raises an error that names the missing class.
"""

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mcseg.checkpoints.translate import translate_hyperparameters


class UnavailableObjective(nn.Module):
    """Stands for an objective that cannot be built; evaluation computes no loss.

    Args:
        name: Class path of the objective.
        reason: Why it cannot be built.

    Attributes:
        is_calibrated: False, so that evaluation does not call it.
    """

    is_calibrated = False

    def __init__(self, name: str, reason: str) -> None:
        super().__init__()
        self.name = name
        self.reason = reason
        self.register_load_state_dict_pre_hook(_drop_tensors)  # type: ignore[no-untyped-call]

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Raise RuntimeError."""
        raise RuntimeError(self.message)

    @property
    def message(self) -> str:
        """Text of the error if it is needed."""
        return _message("objective", self.name, self.reason)


def _drop_tensors(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


class UnavailableOptimizer(Optimizer):
    """Stands for an optimiser that cannot be built: creating it raises RuntimeError."""

    def __init__(self, params: Any, name: str, reason: str) -> None:
        raise RuntimeError(_message("optimizer", name, reason))


class UnavailableScheduler(LRScheduler):
    """Stands for a scheduler that cannot be built: creating it raises RuntimeError."""

    def __init__(self, optimizer: Optimizer, name: str, reason: str) -> None:
        raise RuntimeError(_message("scheduler", name, reason))


_PLACEHOLDERS = {"objective": UnavailableObjective, "optimizer": UnavailableOptimizer, "scheduler": UnavailableScheduler}


def labelling_hyperparameters(stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate a checkpoint's hyperparameters for a module that labels images.

    Args:
        stored: The module's arguments in plain types; not modified.

    Returns:
        The arguments, with placeholders for the classes that cannot be built, and a line for each change.
    """
    try:
        arguments, remarks = translate_hyperparameters(stored)
    except ValueError as error:  # the objective of an earlier version has no successor
        objective = stored["objective"]
        arguments, remarks = translate_hyperparameters({**stored, "objective": None})
        arguments["objective"] = objective
        _replace(arguments, remarks, "objective", reason=str(error))
    for name, reason in unavailable(arguments).items():
        _replace(arguments, remarks, name, reason=reason)
    return arguments, remarks


def unavailable(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the arguments whose class cannot be imported or refuses the arguments, with the reason."""
    reasons = {name: _reason(arguments.get(name), positional=name != "objective") for name in _PLACEHOLDERS}
    return {name: reason for name, reason in reasons.items() if reason}


def _replace(arguments: dict[str, Any], remarks: list[str], name: str, *, reason: str) -> None:
    placeholder, class_path = _PLACEHOLDERS[name], arguments[name]["class_path"]
    arguments[name] = {
        "class_path": f"{placeholder.__module__}.{placeholder.__qualname__}",
        "init_args": {"name": class_path, "reason": reason},
    }
    losses = "; val/loss and test/loss are not computed" if name == "objective" else ""
    remarks.append(f"{name} {class_path} cannot be built ({reason}); only training needs it{losses}")


def _reason(specification: Any, *, positional: bool) -> str:
    """Return why a class path with arguments cannot be built; "" if it can, or if another check has to decide.

    Args:
        specification: Mapping with ``class_path`` and, optionally, ``init_args``; anything else is not checked.
        positional: Whether the class gets an argument besides these: parameters, or the optimiser.
    """
    if not isinstance(specification, Mapping) or not isinstance(path := specification.get("class_path"), str):
        return ""
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:  # importing a user's file may raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    if not (inspect.isclass(found) and issubclass(found, nn.Module | Optimizer | LRScheduler)):
        return ""
    try:
        inspect.signature(found).bind(*[None] * positional, **(specification.get("init_args") or {}))
    except TypeError as error:
        return str(error)
    return ""


def _message(kind: str, name: str, reason: str) -> str:
    return (
        f"{kind}: the checkpoint's {name} cannot be built ({reason}); training needs it: restore its file, run in the "
        f"folder of the file, or give another one (model.{kind}, or load_from_checkpoint(..., {kind}=...))"
    )
