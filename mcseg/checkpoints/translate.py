"""Hyperparameters of checkpoints that earlier versions wrote, in the terms of this one."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning.utilities import rank_zero_info

# Changes the arguments of a module in place; returns in a line what it did, or "".
Translation = Callable[[dict[str, Any]], str]


def translate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the arguments of a module as a checkpoint holds them; each translation reports in one line what it did.

    Args:
        arguments: plain types, by name; left as they are.

    Returns:
        The arguments that this version takes, in plain types.

    Raises:
        ValueError: an argument without a successor.
    """
    found = copy.deepcopy(dict(arguments))
    for translation in _TRANSLATIONS:
        if done := translation(found):
            rank_zero_info(f"checkpoint of an earlier version: {done}")
    return found


def _schedule(arguments: dict[str, Any]) -> str:
    """``lr_power`` and ``warmup_steps`` were arguments of the module, for the schedule that ``scheduler`` None stood for."""
    moved = {"lr_power": "power", "warmup_steps": "warmup_steps"}
    old = {new: arguments.pop(name) for name, new in moved.items() if name in arguments}
    if arguments.get("scheduler") is not None:  # another schedule, on which they had no effect
        return ""
    arguments.pop("scheduler", None)  # the default of this version is the same schedule
    if not old:
        return ""
    arguments["scheduler"] = {"class_path": "mcseg.schedules.WarmupPolynomialLR", "init_args": old}
    return f"lr_power and warmup_steps are now settings of the scheduler, WarmupPolynomialLR: {old}"


_TRANSLATIONS: tuple[Translation, ...] = (_schedule,)
