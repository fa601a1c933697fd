"""Recipes, the YAML files that come with mcseg, and short forms of command-line arguments."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mcseg.messages import one_line

RECIPES = Path(__file__).parents[1] / "configs"
_NO_OBJECTIVE = "--model.objective=null"
_NO_OPTIONS = "--model.network_options=null"


def recipe_names() -> list[str]:
    """List the names of the packaged recipes; those in subfolders as ``folder/name``."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def default_objective() -> dict[str, Any]:
    """Return class path and arguments of the default objective."""
    objective: dict[str, Any] = yaml.safe_load(recipe_path("objectives/default").read_text())["model"]["objective"]
    return objective


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Expand short forms: a recipe after the verb, ``--root``, ``--format``, the settings of ``bound``."""
    verb, *rest = words
    if rest and not rest[0].startswith("-"):
        rest.insert(0, "--config")
    short = {"--root": "--data.root", "--format": "--writer.format"}
    if verb == "bound":
        short |= {f"--{name}": f"--bound.{name}" for name in ("level", "group", "selected_from", "largest_pixels")}
    pairs = (word.partition("=") for word in rest)
    return [verb, *(short.get(flag, flag) + equals + value for flag, equals, value in pairs)]


def find_recipes(words: Sequence[str]) -> tuple[str, list[str]]:
    """Replace the names of recipes by their paths.

    Args:
        words: verb and arguments, short forms expanded. Without a recipe and data, ``synthetic`` is added.

    Returns:
        The name of the first recipe, for the run folder, and the arguments for the parser.

    Raises:
        FileNotFoundError: a recipe is neither a file nor a packaged recipe.
        ValueError: a recipe is not a YAML mapping.
    """
    expanded: list[str] = []
    names: list[str] = []
    recipes_end = 1  # index after the last recipe in `expanded`
    after_config = False
    for before, word in zip(["", *words], words, strict=False):
        flag, _, value = word.partition("=")
        if before == "--model.objective":
            expanded.append(_full_name(word))
        elif after_config or (flag in ("--config", "-c") and value):
            names.append(word if after_config else value)
            expanded += _layer(recipe_path(names[-1]), first=len(names) == 1)
            recipes_end = len(expanded)
        elif word not in ("--config", "-c"):
            word = f"{flag}={_full_name(value)}" if flag == "--model.objective" and value else word
            expanded += [_NO_OBJECTIVE, word] if flag == "--model.objective" else [word]
            if flag == "--model.arch":  # drops the recipe's options, but not those on the command line
                expanded.insert(recipes_end, _NO_OPTIONS)
        after_config = word in ("--config", "-c")
    if after_config:
        expanded.append("--config")  # the parser reports the missing value
    asks_help = any(word in ("-h", "--help") for word in words)
    if (
        not names
        and not asks_help
        and not any(word.startswith("--data") and not word.startswith("--data.") for word in words)
    ):
        names = ["synthetic"]  # embedded data, so that every verb runs without arguments
        expanded[1:1] = ["--config", str(recipe_path("synthetic"))]
    return Path(names[0]).stem if names else "custom", expanded


def _full_name(objective: str) -> str:
    """Return the class path of an objective of mcseg by its name; other libraries have classes of the same names."""
    from mcseg import losses

    return f"mcseg.losses.{objective}" if objective in losses.__all__ else objective


def recipe_path(name: str) -> Path:
    """Return the path of a recipe.

    Args:
        name: path of a file, or name of a packaged recipe.

    Raises:
        FileNotFoundError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = RECIPES / f"{name}.yaml"
    if not packaged.is_file():
        close = difflib.get_close_matches(name, recipe_names()) or recipe_names()
        raise FileNotFoundError(f"--config {name}: neither a file nor a recipe of mcseg, such as {', '.join(close)}")
    return packaged


def _content(path: Path) -> dict[str, Any]:
    """Read a recipe here, as the parser's errors do not name the file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not a YAML file ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: found {type(content).__name__}, expected keys with values, such as `data:`")
    return content


def _layer(recipe: Path, first: bool) -> list[str]:
    """Return the arguments that put a recipe over those before it, or over the defaults if it is the ``first``.

    A recipe with the class of an objective replaces the objective: without the null, the parser would keep arguments of the
    former objective that the new class accepts as well. A recipe with an architecture replaces the network's options. The
    settings of an earlier version are translated, and given to the parser as text in place of the path.
    """
    content, source = _translated(recipe)
    model = content.get("model")
    objective = model.get("objective") if isinstance(model, dict) else None
    replaces = isinstance(objective, str) or (isinstance(objective, dict) and "class_path" in objective)
    other_arch = not first and isinstance(model, dict) and "arch" in model
    return [*[_NO_OBJECTIVE] * replaces, *[_NO_OPTIONS] * other_arch, "--config", source]


def _translated(recipe: Path) -> tuple[dict[str, Any], str]:
    """Return a recipe's content in the names of this version, and its path or, after a translation, its text."""
    from pytorch_lightning.utilities import rank_zero_info

    from mcseg.checkpoints.translate import translate_config

    content = _content(recipe)
    try:
        translation, remarks = translate_config(content)
    except ValueError as error:
        raise ValueError(f"--config {recipe}: {error}") from None
    for remark in remarks:
        rank_zero_info(f"{recipe}: {remark}")
    return translation, str(recipe) if translation == content else yaml.safe_dump(translation, sort_keys=False)
