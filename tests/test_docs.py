"""The documentation: examples in docstrings run, links lead somewhere, and the reference names every public object."""

import ast
import contextlib
import doctest
import importlib
import io
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from test_architecture import MAY_IMPORT

from mcseg.run.recipes import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/study/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Python blocks of pages that need no data set of their own; the tutorial's first block draws one
BLOCKS = [
    ("docs/tutorial.md", 0),
    ("docs/how-to/evaluate.md", 0),
    ("docs/how-to/objectives.md", 0),
    ("docs/theory/margin-calibration.md", 0),
    ("docs/theory/power-dice.md", 0),
]
PUBLIC = ["", ".callbacks", ".compare", ".data", ".evaluation", ".kernels", ".losses", ".networks"]


def examples():
    """Each docstring with an example, wherever it stands: found in the source, so that none depends on how it is imported."""
    for path in sorted((ROOT / "mcseg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    name = getattr(node, "name", path.stem)
                    place = path.relative_to(ROOT).as_posix()
                    yield pytest.param(text, place, getattr(node, "lineno", 1), id=f"{place}:{name}")


@pytest.mark.parametrize(("text", "place", "line"), list(examples()))
def test_examples_in_docstrings_run_as_they_stand(text, place, line):
    # No names from the module: a reader can paste the example as it is.
    example = doctest.DocTestParser().get_doctest(text, {}, place, place, line)
    report = []
    found = doctest.DocTestRunner().run(example, out=report.append)
    assert found.attempted > 0
    assert found.failed == 0, "".join(report)


def test_every_objective_and_score_has_an_example():
    found = {param.id.rpartition(":")[2] for param in examples()}
    losses = importlib.import_module("mcseg.losses")
    objectives = {name for name in losses.__all__ if name.endswith("Loss")}
    assert objectives | {"margin_calibration_loss", "margin_offsets", "score", "SegmentationModule"} <= found


@pytest.mark.parametrize("part", PUBLIC, ids=lambda part: f"mcseg{part}")
def test_reference_names_every_public_object(part):
    listed = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", reference(), flags=re.MULTILINE))
    module = importlib.import_module(f"mcseg{part}")
    aliases = {"__version__", "Reduction"}  # a string and a Literal, which need no entry
    assert set(module.__all__) - aliases <= listed


def reference():
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "reference").glob("*.rst")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_a_file_and_a_heading(page):
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if heading:
            assert heading in anchors(file), f"{target}: no such heading"


def anchors(page):
    """Names of a page's headings as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_architecture_page_names_every_part_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = [path for path in (ROOT / "mcseg").iterdir() if path.name[0] not in "_."]
    missing = [path.name for path in parts if f"`{path.name}{'/' * path.is_dir()}`" not in text]
    assert missing == ["py.typed"]


def test_architecture_page_shows_the_allowed_imports():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("## Allowed imports")[1].split("\n## ")[0]
    shown = {}
    for left, right in re.findall(r"^\| (`.*?) \| (.*?) \|$", table, flags=re.MULTILINE):
        shown |= {part: set(re.findall(r"`(\w+)`", right)) for part in re.findall(r"`(\w+)`", left)}
    assert {part: shown[part] for part in shown.keys() - {"run", "compare"}} == {
        part: allowed for part, allowed in MAY_IMPORT.items() if part in shown or allowed
    }


@pytest.mark.parametrize(("page", "number"), BLOCKS)
def test_python_blocks_run_and_print_what_the_page_shows(page, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n((?:    [^\n]*\n)+))?", text, flags=re.MULTILINE | re.DOTALL)
    code, output = blocks[number]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, page, "exec"), {"__name__": page})
    if output:
        assert printed.getvalue().split() == output.split()


def commands():
    """Each `mcseg ...` line of the pages, continued lines joined, as words."""
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        for line in lines:
            if match := re.match(r"    (mcseg [a-z].*)", line):
                yield pytest.param(shlex.split(match[1], comments=True)[1:], id=f"{page.relative_to(ROOT)}:{match[1]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_name_verbs_and_recipes_that_exist(words):
    verb, *rest = words
    assert verb in {"fit", "validate", "test", "predict", "bound", "download", "show", "check", "stats", "compare"}
    recipes = [value for flag, value in itertools.pairwise(rest) if flag == "--config"]
    recipes += [word for word in rest[:1] if not word.startswith("-") and not word.upper().endswith("CKPT")]
    assert {name for name in recipes if not name.endswith(".yaml")} <= set(recipe_names())


@pytest.mark.parametrize("facts", sorted((ROOT / "mcseg" / "data" / "facts").glob("*.toml")), ids=lambda path: path.stem)
def test_page_on_benchmarks_shows_the_layout_that_is_read(facts):
    tree = tomllib.loads(facts.read_text(encoding="utf-8"))["download"]["tree"]
    assert f"```text\n{tree.strip()}\n```" in (ROOT / "docs" / "how-to" / "benchmarks.md").read_text(encoding="utf-8")
