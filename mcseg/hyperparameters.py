"""Arguments of a module as plain types, from which a checkpoint's objects are made again."""

import functools
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from pytorch_lightning.cli import instantiate_module
from torch import nn


def plain_hyperparameters(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Turn the constructor's arguments into plain types from which Lightning's CLI makes the objects again.

    Returns:
        The arguments, and for each that is not recoverable (None among the arguments) the reason.
    """
    plain: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, value in found.items():
        try:
            plain[name] = _plain(value, name)
        except ValueError as error:
            plain[name], reasons[name] = None, str(error)
    objective = plain["objective"]
    if objective and "init_args" in objective:
        # The command line links num_classes to the objective, and Lightning notes it even where the class takes none.
        accepted = inspect.signature(pkgutil.resolve_name(objective["class_path"])).parameters
        objective["init_args"] = {k: v for k, v in objective["init_args"].items() if k != "num_classes" or k in accepted}
    # The one instantiator that Lightning trusts in a checkpoint
    plain["_instantiator"] = f"{instantiate_module.__module__}.{instantiate_module.__name__}"
    return plain, reasons


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, name) for key, item in value.items()}
    if isinstance(value, nn.Module):
        return {"class_path": _path(type(value), name), "init_args": _constructor_arguments(value, name)}
    if isinstance(value, functools.partial) and not value.args:
        return {"class_path": _path(value.func, name), "init_args": _plain(value.keywords, name)}
    if inspect.isclass(value):
        return {"class_path": _path(value, name)}
    raise ValueError(
        f"{name}: found {value!r}, which a checkpoint cannot rebuild; expected a class or a functools.partial of one "
        "with plain arguments"
    )


def _path(callable_: Callable[..., Any], name: str) -> str:
    path = f"{callable_.__module__}.{callable_.__qualname__}"
    if not inspect.isclass(callable_) or "<" in path:
        raise ValueError(
            f"{name}: {path} cannot be imported by name when a checkpoint is loaded; expected a class at the top "
            "level of a module"
        )
    return path


def _constructor_arguments(module: nn.Module, name: str) -> dict[str, Any]:
    """Read the constructor's arguments back from the attributes of the same names, as most losses keep them."""
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(type(module)).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, parameter.name, inspect.Parameter.empty)
        if value is inspect.Parameter.empty:
            if parameter.name in ("size_average", "reduce"):  # torch's deprecated pair, folded into `reduction`
                continue
            raise ValueError(
                f"{name}: {type(module).__name__} does not keep its argument {parameter.name}, so a checkpoint could "
                f"not rebuild it; give functools.partial({type(module).__name__}, ...), or a class path from YAML"
            )
        arguments[parameter.name] = _plain(value, f"{name}.{parameter.name}")
    return arguments
