"""Recipes, the YAML files that come with mcseg, and short forms of command-line arguments."""

import difflib
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mcseg.messages import one_line

RECIPES = Path(__file__).parents[1] / "configs"
_CONFIG = ("--config", "-c")
_CALLBACKS = "--trainer.callbacks"
_NO_OBJECTIVE = "--model.objective=null"
_NO_OPTIONS = "--model.network_options=null"
_TRAINING = ("fit", "compare")  # the verbs that need the objective


def recipe_names() -> list[str]:
    """List the names of the packaged recipes; those in subfolders as ``folder/name``."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def default_objective() -> dict[str, Any]:
    """Return class path and arguments of the default objective."""
    objective: dict[str, Any] = yaml.safe_load(recipe_path("objectives/default").read_text())["model"]["objective"]
    return objective


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Expand short forms: a recipe or a checkpoint after the verb, ``--root``, ``--images``, ``--format``, ``bound``'s."""
    verb, *rest = words
    if verb == "predict":
        rest = _one_value(rest, "--images")
    if verb in ("validate", "test", "predict", "bound"):
        is_value = [False, *(word.startswith("-") and "=" not in word for word in rest)]
        rest = [
            f"--ckpt_path={word}" if word.endswith(".ckpt") and word[0] != "-" and not after_flag else word
            for word, after_flag in zip(rest, is_value, strict=False)
        ]
    if rest and not rest[0].startswith("-"):
        rest.insert(0, "--config")
    short = {"--root": "--data.root", "--format": "--writer.format", "--model.lr": "--model.optimizer.lr"}
    if verb == "predict":
        short["--images"] = "--data.predict_root"
    if verb == "bound":
        short |= {f"--{name}": f"--bound.{name}" for name in ("level", "group", "selected_from", "largest_pixels")}
    pairs = (word.partition("=") for word in rest)
    return [verb, *(short.get(flag, flag) + equals + value for flag, equals, value in pairs)]


def _one_value(words: Sequence[str], flag: str) -> list[str]:
    """Join the values of a flag to one list, so that a shell may expand a pattern: ``--images a.jpg b.jpg``."""
    if flag not in words:
        return list(words)
    start = list(words).index(flag) + 1
    ends = (index for index in range(start, len(words)) if words[index].startswith("-") or words[index].endswith(".ckpt"))
    end = next(ends, len(words))
    values = list(words[start:end])
    return [*words[:start], *([json.dumps(values)] if len(values) > 1 else values), *words[end:]]


def find_recipes(words: Sequence[str]) -> tuple[str, list[str]]:
    """Replace the names of recipes by their paths.

    Args:
        words: Verb and arguments, short forms expanded. If no recipe has data, ``synthetic`` is the first recipe,
            or ``folder`` for the prediction of images.

    Returns:
        The name of the first recipe, for the run folder, and the arguments for the parser.

    Raises:
        FileNotFoundError: A recipe is neither a file nor a packaged recipe.
        ValueError: A recipe is not a YAML mapping.
    """
    if _lacks_data(words):
        # Embedded data, so that every verb runs without arguments; for images to predict, the checkpoint has the classes.
        predicts = words[0] == "predict" and any(word.startswith("--data.predict_root") for word in words)
        words = [*words[:1], "--config", "folder" if predicts else "synthetic", *words[1:]]
    expanded: list[str] = []
    names: list[str] = []
    recipes_end = 1  # index after the last recipe in `expanded`
    for flag, value in _flags_and_values(words):
        if flag in _CONFIG and value:
            names.append(value)
            expanded += _layer(recipe_path(value, words[0]), first=len(names) == 1, trains=words[0] in _TRAINING)
            recipes_end = len(expanded)
        elif flag == "--model.objective" and value:
            expanded += [_NO_OBJECTIVE, f"{flag}={_full_name(value)}"]
        elif flag == _CALLBACKS and value and yaml.safe_load(value):  # null and [] remove the recipe's callbacks
            expanded.append(f"{flag}+={value}")
        else:  # the parser reports missing values
            expanded.append(flag if value is None else f"{flag}={value}")
        if flag == "--model.arch":  # replaces the recipe's options, but not those on the command line
            expanded.insert(recipes_end, _NO_OPTIONS)
    return Path(names[0]).stem if names else "custom", expanded


def _lacks_data(words: Sequence[str]) -> bool:
    """Whether neither a recipe nor ``--data`` chooses the data; False if the words ask for help."""
    if any(word in ("-h", "--help") or word.partition("=")[0] == "--data" for word in words):
        return False
    recipes = [value for flag, value in _flags_and_values(words) if flag in _CONFIG and value]
    return not any("data" in _content(recipe_path(name, words[0])) for name in recipes)


def _flags_and_values(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield flag and value of ``--flag value`` and ``--flag=value`` for the flags that `find_recipes` replaces.

    All other words are yielded unchanged, with the value None.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in (*_CONFIG, "--model.objective", "--model.arch", _CALLBACKS):
            yield word, None
        elif equals:
            yield flag, value
        else:
            yield flag, rest.pop(0) if rest and not rest[0].startswith("-") else None


def _full_name(objective: str) -> str:
    """Return the class path of an objective of mcseg by its name; a bare name would be ambiguous."""
    from mcseg import losses

    return f"mcseg.losses.{objective}" if objective in losses.__all__ else objective


def recipe_path(name: str, verb: str = "fit") -> Path:
    """Return the path of a recipe.

    Args:
        name: Path of a file, or name of a packaged recipe.
        verb: Verb of the command, for messages.

    Raises:
        FileNotFoundError: Neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    if name not in recipe_names():
        if Path(name).is_dir():
            raise FileNotFoundError(f"--config: {name} is a folder; use: mcseg {verb} folder --root {shlex.quote(name)}")
        by_word = {path.rpartition("/")[2]: path for path in recipe_names()} | {path: path for path in recipe_names()}
        closest = by_word[difflib.get_close_matches(name, by_word, n=1, cutoff=0)[0]]
        raise FileNotFoundError(
            f"--config {name}: neither a file nor a recipe of mcseg, such as {closest}; mcseg --help lists all recipes"
        )
    return RECIPES / f"{name}.yaml"


def _content(path: Path) -> dict[str, Any]:
    """Read a recipe; the parser's errors would not name the file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not a YAML file ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: found {type(content).__name__}, expected keys with values, such as `data:`")
    return content


def _layer(recipe: Path, *, first: bool, trains: bool) -> list[str]:
    """Return the arguments that layer a recipe on the previous ones, or on the defaults if it is the ``first``.

    A recipe with the class of an objective replaces the objective: without the null, the parser would keep arguments of the
    previous objective that the new class accepts as well. A recipe with an architecture replaces the network's options. The
    callbacks of recipes add up. Changed settings, also those of an earlier version that are translated, are passed to the
    parser as text instead of the path. Unless the verb ``trains``, an objective, optimiser or scheduler that cannot be built
    is left out.
    """
    content, source = _translated(recipe, trains=trains)
    trainer, callbacks = content.get("trainer"), []
    if not first and isinstance(trainer, dict) and trainer.get("callbacks"):
        callbacks = [f"{_CALLBACKS}+={json.dumps(trainer['callbacks'])}"]  # the parser appends
        trainer = {key: value for key, value in trainer.items() if key != "callbacks"}
        source = yaml.safe_dump({**content, "trainer": trainer}, sort_keys=False)
    model = content.get("model")
    objective = model.get("objective") if isinstance(model, dict) else None
    replaces = isinstance(objective, str) or (isinstance(objective, dict) and "class_path" in objective)
    other_arch = not first and isinstance(model, dict) and "arch" in model
    return [*[_NO_OBJECTIVE] * replaces, *[_NO_OPTIONS] * other_arch, "--config", source, *callbacks]


def _translated(recipe: Path, *, trains: bool) -> tuple[dict[str, Any], str]:
    """Return a recipe's content, translated to this version's names, and its path or, if translated, its text."""
    from pytorch_lightning.utilities import rank_zero_info

    from mcseg.checkpoints.translate import translate_config
    from mcseg.checkpoints.unavailable import unavailable

    content = _content(recipe)
    try:
        translation, remarks = translate_config(content)
    except ValueError as error:
        raise ValueError(f"--config {recipe}: {error}") from None
    for remark in remarks:
        rank_zero_info(f"{recipe}: {remark}")
    translation = _with_learning_rate(translation, recipe)
    model = translation.get("model")
    if not trains and isinstance(model, dict) and (reasons := unavailable(model)):
        translation = translation | {"model": {name: value for name, value in model.items() if name not in reasons}}
        for name, reason in reasons.items():
            rank_zero_info(
                f"{recipe}: {name} {model[name]['class_path']} cannot be built ({reason}); only training needs it"
            )
    return translation, str(recipe) if translation == content else yaml.safe_dump(translation, sort_keys=False)


def _with_learning_rate(content: dict[str, Any], recipe: Path) -> dict[str, Any]:
    """Move ``model.lr`` to the optimiser, so that later layers and arguments can override it."""
    model = content.get("model")
    if not isinstance(model, dict) or model.get("lr") is None:
        return content
    optimizer = model.get("optimizer") or {}
    optimizer = {"class_path": optimizer} if isinstance(optimizer, str) else dict(optimizer)
    arguments = {key: value for key, value in optimizer.items() if key not in ("class_path", "init_args")}
    arguments |= optimizer.get("init_args") or {}
    if arguments.get("lr", model["lr"]) != model["lr"]:
        raise ValueError(
            f"--config {recipe}: found model.lr {model['lr']} and lr {arguments['lr']} of model.optimizer; remove one"
        )
    known = {"class_path": optimizer["class_path"]} if "class_path" in optimizer else {}
    optimizer = {**known, "init_args": {**arguments, "lr": model["lr"]}}
    return {**content, "model": {**model, "lr": None, "optimizer": optimizer}}
