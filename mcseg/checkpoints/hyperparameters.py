"""A module's arguments as plain types for checkpoints, and checks before objects are created from them."""

import functools
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mcseg.checkpoints.files import read_checkpoint, written_by
from mcseg.checkpoints.unavailable import labelling_hyperparameters
from mcseg.lightning_internals import CLASS_PATH_KEY, INSTANTIATOR, INSTANTIATOR_KEY, argument_keys, as_settings
from mcseg.messages import one_line


def _to_tensor(value: Any) -> Tensor:
    """Convert numbers of a YAML file, a command or a checkpoint to a float32 tensor."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)


# Makes the parser read and write tensors as lists of numbers, for example the weight of torch.nn.CrossEntropyLoss.
register_type(Tensor, serializer=Tensor.tolist, deserializer=_to_tensor)


def plain_hyperparameters(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Turn a module's arguments into plain types from which Lightning recreates the objects.

    Args:
        arguments: The constructor's arguments by name.

    Returns:
        The plain arguments, None for those that cannot be recreated; and the reason for each of these.
    """
    plain: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, value in arguments.items():
        try:
            plain[name] = _plain(value, name)
        except ValueError as error:
            plain[name], reasons[name] = None, str(error)
    objective = plain["objective"]
    if objective and "init_args" in objective:
        # The command line links num_classes to the objective, and Lightning stores it even if the class does not accept it.
        accepted = inspect.signature(pkgutil.resolve_name(objective["class_path"])).parameters
        objective["init_args"] = {k: v for k, v in objective["init_args"].items() if k != "num_classes" or k in accepted}
    plain[INSTANTIATOR_KEY] = INSTANTIATOR
    return plain, reasons


def changed_arguments(kind: type[LightningModule], source: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a checkpoint's module that an earlier version stored differently, translated.

    An objective, optimiser or scheduler that cannot be built is replaced by a placeholder, which only training refuses.
    Reports each change in a line, and checks all stored arguments with `refuse_calls`.

    Args:
        kind: The module's class.
        source: Path, URL or open file.
        given: Arguments of the caller, which replace stored ones.

    Returns:
        Translated arguments by name.

    Raises:
        ValueError: The file is not a checkpoint, or `refuse_calls` rejects its arguments.
    """
    checkpoint = read_checkpoint(source)
    stored = {name: value for key in argument_keys(kind) for name, value in checkpoint.get(key, {}).items()}
    try:
        arguments, remarks = labelling_hyperparameters({name: value for name, value in stored.items() if name not in given})
        refuse_calls(kind, arguments, given)
    except ValueError as error:
        raise ValueError(f"{source} ({written_by(checkpoint)}): {error}") from None
    for remark in remarks:
        rank_zero_info(f"{source}: {remark}")
    return {name: value for name, value in arguments.items() if name not in stored or value != stored[name]}


def refuse_calls(kind: type, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError for stored arguments that would call more than network, loss, optimiser and scheduler classes.

    If an argument is a callable, the parser accepts any function as its class path. Plain text in a checkpoint, which
    ``weights_only`` accepts, could thus call ``os.system``. This parses the text as the parser will, and checks the result
    before an object is created.

    Args:
        kind: The module's class.
        stored: The arguments in a checkpoint.
        given: Arguments of the caller, which replace stored ones and are trusted.

    Raises:
        ValueError: An argument would call something else, or the class does not accept it.
    """
    if not stored:
        return
    if dotted := [name for name in stored if "." in name]:  # could set a part of an argument of the caller
        raise ValueError(f"found the arguments {dotted}, expected names without dots")
    parser = ArgumentParser(exit_on_error=False)
    arguments = {**stored, **given}
    if arguments.get(CLASS_PATH_KEY):
        parser.add_subclass_arguments(kind, "model", fail_untyped=False)
    else:
        parser.add_class_arguments(kind, "model", fail_untyped=False)
    try:
        parsed = parser.parse_object({"model": as_settings(arguments)}).model
    except ArgumentError as error:
        raise ValueError(one_line(error)) from None
    values = {**parsed.get("dict_kwargs", {}), **vars(parsed.get("init_args", parsed))}
    for name, value in values.items():
        if name not in given and (called := next(_called(value), None)):
            raise ValueError(
                f"{name}: found {called}, expected a class of networks, losses, optimisers or schedulers (nn.Module, "
                f"Optimizer, LRScheduler); to use it nevertheless, call load_from_checkpoint(..., {name}=...)"
            )


def _called(value: Any) -> Iterator[str]:
    """Yield the paths that creating a parsed value would call and that `refuse_calls` does not allow."""
    if isinstance(value, Namespace | dict):
        entries = vars(value) if isinstance(value, Namespace) else value
        if isinstance(path := entries.get("class_path"), str) and not _is_allowed(_resolve(path)):
            yield path
        for entry in entries.values():
            yield from _called(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _called(entry)
    elif callable(value) and not _is_allowed(value):
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"


def _resolve(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None


def _is_allowed(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module | Optimizer | LRScheduler)


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
        path = _path(value.func, name)
        return {"class_path": path, "init_args": {k: _argument(value.func, k, v, name) for k, v in value.keywords.items()}}
    if inspect.isclass(value):
        return {"class_path": _path(value, name)}
    raise ValueError(
        f"{name}: found {value!r}, which cannot be recreated from a checkpoint; expected a class or a functools.partial of "
        "one with plain arguments"
    )


def _path(callable_: Callable[..., Any], name: str) -> str:
    path = f"{callable_.__module__}.{callable_.__qualname__}"
    is_local = not inspect.isclass(callable_) or "<" in path or callable_.__module__ in ("__main__", "__mp_main__")
    if is_local or not inspect.isclass(_resolve(path)):
        raise ValueError(
            f"{name}: found {path}, which cannot be imported by name when a checkpoint is loaded; expected a class at the "
            f"top level of a module; move it to a file, for example my_{name}s.py, and import it from there"
        )
    return path


def _constructor_arguments(module: nn.Module, name: str) -> dict[str, Any]:
    """Read the constructor's arguments from attributes of the same names, which most losses have."""
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(type(module)).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, parameter.name, inspect.Parameter.empty)
        if value is inspect.Parameter.empty:
            if parameter.name in ("size_average", "reduce"):  # torch's deprecated arguments, merged into `reduction`
                continue
            raise ValueError(
                f"{name}: {type(module).__name__} has no attribute for its argument {parameter.name}, so it cannot be "
                f"recreated from a checkpoint; give functools.partial({type(module).__name__}, ...), or a class path in YAML"
            )
        arguments[parameter.name] = _argument(type(module), parameter.name, value, name)
    return arguments


def _argument(cls: Callable[..., Any], key: str, value: Any, name: str) -> Any:
    """Return an argument of a class in plain types; a floating-point tensor is a list if the class declares a tensor."""
    if not isinstance(value, Tensor):
        return _plain(value, f"{name}.{key}")
    if not value.is_floating_point() or not _declares_tensor(cls, key):
        raise ValueError(
            f"{name}.{key}: found a tensor, which a checkpoint stores as a list of numbers; give {cls.__qualname__} a list, "
            f"or a floating-point tensor that its constructor declares ({key}: torch.Tensor | None)"
        )
    return value.tolist()


def _declares_tensor(cls: Callable[..., Any], key: str) -> bool:
    try:
        hint = get_type_hints(cls.__init__).get(key)
    except Exception:  # an annotation of the user's class that cannot be evaluated
        return False
    return Tensor in (hint, *get_args(hint))
