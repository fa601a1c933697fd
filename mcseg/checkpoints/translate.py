"""Translate the settings in checkpoints and config files of earlier versions."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

# Former arguments of MarginCalibrationLoss, with their defaults
_FAMILY = {
    "margin": "hard",
    "surrogate": "log",
    "aggregation": "sum",
    "weighting": "foreground",
    "false_alarm_weight": 1.0,
    "classes": "present",
    "smooth": 1.0,
    "decay": 0.95,
    "power": 1.0,
}
# Scheme -> the arguments that it uses
_SCALES = {"ijcv2022": ("tau", "upsilon"), "miou": ("max_margin",), "none": ()}
# Former arguments of the module for its polynomial schedule -> arguments of WarmupPolynomialLR
_SCHEDULE = {"lr_power": "power", "warmup_steps": "warmup_steps"}
# Schedules that count what they always counted
_INTERVAL_UNCHANGED = ("WarmupPolynomialLR", "OneCycleLR", "CyclicLR", "ReduceLROnPlateau")

# Settings of FolderData in the config.yaml of runs of earlier versions, which drew random splits by the images' order
_FOLDER_SETTINGS = {"split", "val_fraction", "test_fraction", "split_seed", "images_dir", "masks_dir", "mask_suffix"}


def translate_hyperparameters(stored: Mapping[str, Any], *, counted_steps: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Translate a checkpoint's hyperparameters into arguments of this version's module.

    Args:
        stored: The module's arguments in plain types; not modified.
        counted_steps: Whether a schedule without ``scheduler_interval`` counted optimiser steps, as all once did.

    Returns:
        The arguments, and a line for each change.

    Raises:
        ValueError: The objective has no successor.
    """
    arguments = dict(stored)
    remarks: list[str] = []
    if isinstance(objective := arguments.get("objective"), Mapping):
        arguments["objective"] = _objective(objective, remarks)
    _schedule(arguments, remarks)
    if counted_steps:
        _interval(arguments, remarks)
    return arguments, remarks


def translate_config(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate the content of a config file; without settings of an earlier version it is unchanged.

    Args:
        content: A run's ``config.yaml`` or a recipe; not modified.

    Returns:
        The content, and a line for each change.

    Raises:
        ValueError: The objective has no successor.
    """
    content, split_remarks = _data_split(content)
    model = content.get("model")
    if not isinstance(model, Mapping):
        return dict(content), split_remarks
    # only a config.yaml that a run wrote has this key; an older one counted steps, but a recipe has this version's meaning
    is_saved = "ckpt_path" in content and "scheduler_interval" not in model
    if not is_saved and not _SCHEDULE.keys() & model.keys() and not _has_former_arguments(model.get("objective")):
        return dict(content), split_remarks
    arguments, remarks = translate_hyperparameters(model, counted_steps=is_saved)
    return {**content, "model": arguments}, [*split_remarks, *remarks]


def drop_unused_offsets(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Delete offsets from a checkpoint's ``state_dict`` if the objective's successor has none.

    Args:
        state: The checkpoint's tensors; modified.
        own: The module's tensors.
    """
    for name in list(state):
        if name.startswith("objective.") and name.endswith(("foreground_offsets", "background_offsets")) and name not in own:
            del state[name]


def rename_checkpoint_callbacks(states: dict[str, Any], wanted: Collection[str]) -> None:
    """Rename the states of the command's two checkpoint callbacks, which were plain ``ModelCheckpoint``s.

    Args:
        states: State of each callback by its key; modified.
        wanted: Keys of the callbacks that will load their states.
    """
    for key in [key for key in states if key.startswith("ModelCheckpoint{") and key not in wanted]:
        for kind in ("BestCheckpoint", "LastCheckpoint"):
            if (new := kind + key.removeprefix("ModelCheckpoint")) in wanted and new not in states:
                states[new] = states.pop(key)
                break


def _data_split(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Keep the random split of a run whose images were drawn by their order.

    The ``config.yaml`` of a run has all settings of its data, a recipe has a few: `_FOLDER_SETTINGS` are those of a folder
    before ``draw`` existed.
    """
    data = content.get("data")
    given = data.get("init_args") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(given, Mapping):
        return content, []
    is_folder = str(data.get("class_path", "")).rpartition(".")[2] == "FolderData"
    if not is_folder or "draw" in given or not given.keys() >= _FOLDER_SETTINGS:
        return content, []
    remarks = []
    if given["split"] in ("auto", "fraction"):
        remarks.append("data: a random split is kept as it was (draw order); new runs draw each image by its name")
    return {**content, "data": {**data, "init_args": {**given, "draw": "order"}}}, remarks


def _schedule(arguments: dict[str, Any], remarks: list[str]) -> None:
    """Translate ``lr_power`` and ``warmup_steps``, which a module without a ``scheduler`` used."""
    old = {new: arguments.pop(name) for name, new in _SCHEDULE.items() if name in arguments}
    if arguments.get("scheduler") is not None:  # another schedule, on which they had no effect
        return
    arguments.pop("scheduler", None)  # the module's default is the same schedule; a test ensures that
    if old:
        arguments["scheduler"] = {"class_path": "mcseg.schedules.WarmupPolynomialLR", "init_args": old}
        given = ", ".join(f"{name} {value}" for name, value in old.items())
        remarks.append(f"scheduler: lr_power and warmup_steps are read as mcseg.schedules.WarmupPolynomialLR ({given})")


def _interval(arguments: dict[str, Any], remarks: list[str]) -> None:
    """Let a schedule without ``scheduler_interval`` count optimiser steps, as all schedules did."""
    if "scheduler_interval" in arguments or not isinstance(scheduler := arguments.get("scheduler"), Mapping):
        return
    kind = str(scheduler.get("class_path")).rpartition(".")[2]
    if kind not in _INTERVAL_UNCHANGED:
        arguments["scheduler_interval"] = "step"
        remarks.append(f"scheduler: {kind} of an earlier version counts optimiser steps (scheduler_interval step)")


def _is_margin_loss(path: str) -> bool:
    return path.startswith("mcseg.") and path.endswith(".MarginCalibrationLoss")


def _has_former_arguments(objective: Any) -> bool:
    if not isinstance(objective, Mapping) or not isinstance(given := objective.get("init_args"), Mapping):
        return False
    path = str(objective.get("class_path", ""))
    if path.endswith("SumLoss"):
        return any(map(_has_former_arguments, given.get("objectives") or ()))
    return _is_margin_loss(path) and bool(_FAMILY.keys() & given.keys())


def _objective(objective: Mapping[str, Any], remarks: list[str]) -> dict[str, Any]:
    path, given = objective.get("class_path", ""), dict(objective.get("init_args") or {})
    kind = path.rpartition(".")[2]
    if kind == "SumLoss":
        given["objectives"] = [
            _objective(part, remarks) | ({"weight": part["weight"]} if "weight" in part else {})
            for part in given.get("objectives", ())
        ]
        return {**objective, "init_args": given}
    if not _is_margin_loss(path):
        return dict(objective)
    scheme = given.get("scheme", "ijcv2022")
    effective = {name: value for name, value in given.items() if name not in ("tau", "upsilon", "max_margin")}
    effective |= {name: given[name] for name in _SCALES.get(scheme, ()) if name in given}
    if not _FAMILY.keys() & given.keys():
        return {**objective, "init_args": effective}
    family = {name: given.get(name, default) for name, default in _FAMILY.items()}
    own = {name: value for name, value in effective.items() if name not in _FAMILY}
    shared = {name: own[name] for name in ("ignore_index", "backend") if name in own}
    form = (family["margin"], family["surrogate"], family["aggregation"])
    if form in (("soft", "sigmoid", "dice"), ("soft", "sigmoid", "jaccard")) and scheme == "none":
        successor = {"dice": "DiceLoss", "jaccard": "JaccardLoss"}[form[2]]
        arguments = {name: family[name] for name in ("classes", "smooth", "power")} | shared
    elif form != ("hard", "log", "sum") or family["false_alarm_weight"] != 1.0:
        raise _no_successor(family, scheme)
    elif family["weighting"] == "iou":
        if scheme != "miou" or own.get("reduction", "mean") != "mean":
            raise _no_successor(family, scheme)
        successor = "IoUWeightedLoss"
        kept = {name: own[name] for name in ("num_classes", "max_margin") if name in own}
        arguments = kept | {"decay": family["decay"]} | shared
    else:
        successor, arguments = "MarginCalibrationLoss", dict(own)
        if family["weighting"] == "uniform":
            arguments["foreground_weight"] = 1.0
    path = f"mcseg.losses.{successor}"
    if successor != kind or arguments != own:
        differing = ", ".join(f"{name} {value}" for name, value in {"scheme": scheme, **family}.items() if name in given)
        new = ", ".join(f"{name} {value}" for name, value in arguments.items())
        remarks.append(f"objective: {kind} of an earlier version ({differing}) is read as {path} ({new})")
    return {"class_path": path, "init_args": arguments}


def _no_successor(family: Mapping[str, Any], scheme: str) -> ValueError:
    found = ", ".join(f"{name} {value}" for name, value in family.items() if value != _FAMILY[name])
    return ValueError(
        f"objective: MarginCalibrationLoss of an earlier version with {found}, scheme {scheme} has no successor; give "
        "another one: load_from_checkpoint(..., objective=...) in Python, --model.init_from on the command line"
    )
