"""The documentation: examples in docstrings run, links lead somewhere, and the reference names every public object."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
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
