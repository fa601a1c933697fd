"""Recipes: the YAML files that come with mcseg, by name, and what a person may say short on the command line."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mcseg.messages import one_line

RECIPES = Path(__file__).parents[1] / "configs"
_NO_OBJECTIVE = "--model.objective=null"
_NO_OPTIONS = "--model.network_options=null"  # which are those of one architecture


def recipe_names() -> list[str]:
    """List the packaged recipes, those in folders as ``folder/name``."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def default_objective() -> dict[str, Any]:
    """Class path and arguments of the objective of a run without one of its own."""
    objective: dict[str, Any] = yaml.safe_load(recipe_path("objectives/default").read_text())["model"]["objective"]
    return objective


def expand_shorthand(words: Sequence[str]) -> list[str]:
    """Spell out what may be said short: a recipe behind the verb, ``--root``, ``--format``, the settings of ``bound``."""
    verb, *rest = words
    if rest and not rest[0].startswith("-"):
        rest.insert(0, "--config")
    short = {"--root": "--data.root", "--format": "--writer.format"}
    if verb == "bound":
        short |= {f"--{name}": f"--bound.{name}" for name in ("level", "group", "selected_from", "largest_pixels")}
    pairs = (word.partition("=") for word in rest)
    return [verb, *(short.get(flag, flag) + equals + value for flag, equals, value in pairs)]


def find_recipes(words: Sequence[str]) -> tuple[str, list[str]]:
    """Replace names of packaged recipes by their paths; return the first recipe's name and the arguments."""
    found: list[str] = []
    names: list[str] = []
    behind = 1  # where the last recipe ends
    after_config = False
    for before, word in zip(["", *words], words, strict=False):
        flag, _, value = word.partition("=")
        if before == "--model.objective":
            found.append(_full_name(word))
        elif after_config or (flag in ("--config", "-c") and value):
            names.append(word if after_config else value)
            found += _layer(recipe_path(names[-1]), first=len(names) == 1)
            behind = len(found)
        elif word not in ("--config", "-c"):
            word = f"{flag}={_full_name(value)}" if flag == "--model.objective" and value else word
            found += [_NO_OBJECTIVE, word] if flag == "--model.objective" else [word]
            if flag == "--model.arch":  # the recipe's options go, those on the command line stay
                found.insert(behind, _NO_OPTIONS)
        after_config = word in ("--config", "-c")
    if after_config:
        found.append("--config")  # without a name: the parser says so
    asks_help = any(word in ("-h", "--help") for word in words)
    if (
        not names
        and not asks_help
        and not any(word.startswith("--data") and not word.startswith("--data.") for word in words)
    ):
        names = ["synthetic"]  # the embedded data set, so that every verb works as it is
        found[1:1] = ["--config", str(recipe_path("synthetic"))]
    return Path(names[0]).stem if names else "custom", found


def _full_name(objective: str) -> str:
    """Class path of an objective of mcseg by its name; other libraries have classes of the same names."""
    from mcseg import losses

    return f"mcseg.losses.{objective}" if objective in losses.__all__ else objective


def recipe_path(name: str) -> Path:
    """Find a recipe: a file of that path, or a packaged one of that name; FileNotFoundError where neither exists."""
    if Path(name).is_file():
        return Path(name)
    packaged = RECIPES / f"{name}.yaml"
    if not packaged.is_file():
        close = difflib.get_close_matches(name, recipe_names()) or recipe_names()
        raise FileNotFoundError(f"--config {name}: neither a file nor a recipe of mcseg, such as {', '.join(close)}")
    return packaged


def _content(path: Path) -> dict[str, Any]:
    """A recipe's keys; the parser of the command line has forgotten the file's name by the time it reads it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not a YAML file ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: found {type(content).__name__}, expected keys with values, such as `data:`")
    return content


def _layer(recipe: Path, first: bool) -> list[str]:
    """Words that lay a recipe over those before it; the first one lies over the defaults.

    A recipe that names the class of an objective replaces the objective. Without the null before it, an objective of another
    class would keep those of the old one's arguments that it knows as well, and one of the same class all that it does not
    name. One that names an architecture replaces the options of the network.
    """
    model = _content(recipe).get("model")
    objective = model.get("objective") if isinstance(model, dict) else None
    replaces = isinstance(objective, str) or (isinstance(objective, dict) and "class_path" in objective)
    other_arch = not first and isinstance(model, dict) and "arch" in model
    return [*[_NO_OBJECTIVE] * replaces, *[_NO_OPTIONS] * other_arch, "--config", str(recipe)]
