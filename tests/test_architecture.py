"""Rules of the architecture: allowed imports, fast start, dependencies, metadata."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mcseg"

# Part of the package -> the parts that it may import. `run`, `compare`, `__init__` and `__main__` may import everything.
MAY_IMPORT = {
    "version": set(),
    "atomic": set(),
    "benchmarks": set(),
    "messages": set(),
    "seeds": set(),
    "lightning_internals": set(),
    "nonfinite": set(),
    "monitors": {"evaluation"},
    "preparation": {"checkpoints", "lightning_internals", "losses", "monitors"},
    "schedules": {"checkpoints", "lightning_internals", "monitors"},
    "palette": set(),
    "pictures": {"atomic", "palette"},
    "margins": set(),
    "kernels": set(),
    "networks": {"messages"},
    "data": {"atomic", "benchmarks", "lightning_internals", "messages", "palette", "seeds"},
    "losses": {"margins", "kernels"},
    "evaluation": {"kernels", "margins"},
    "checkpoints": {"atomic", "lightning_internals", "messages", "version"},
    "module": {
        "checkpoints",
        "evaluation",
        "kernels",
        "lightning_internals",
        "losses",
        "monitors",
        "networks",
        "nonfinite",
        "preparation",
        "schedules",
        "seeds",
    },
    "callbacks": {"atomic", "evaluation", "lightning_internals", "monitors", "palette", "pictures"},
}
LAZY_LIBRARIES = {"triton", "wandb", "matplotlib", "scipy", "pandas", "segmentation_models_pytorch", "timm"}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node, node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_parts_import_only_allowed_parts(path):
    own = part_of(path)
    if own in {"run", "compare", "__init__", "__main__"}:
        return
    tree = ast.parse(path.read_text())
    for _, name in imports(tree):
        parts = name.split(".")
        if parts[0] == "mcseg" and len(parts) > 1:
            assert parts[1] in MAY_IMPORT[own] | {own}, f"{own} imports {name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_heavy_libraries_are_imported_at_first_use(path):
    top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for _, name in imports(ast.Module(top_level, []))}
    # these two files are imported at first use themselves
    allowed = {"triton"} if path.name.startswith("gpu") else set()
    assert not names & LAZY_LIBRARIES - allowed
    assert not any(isinstance(node, ast.ImportFrom) and "gpu" in {alias.name for alias in node.names} for node in top_level)


@pytest.mark.slow
def test_import_loads_no_more_than_torch_and_lightning():
    code = "import sys, {}; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = [
        set(
            subprocess.run(
                [sys.executable, "-c", code.format(names)], check=True, capture_output=True, text=True
            ).stdout.split()
        )
        for names in ("mcseg", "torch, pytorch_lightning")
    ]
    assert loaded[0] - loaded[1] == {"mcseg"}


@pytest.mark.parametrize("words", [["--help"], ["--version"]], ids=" ".join)
def test_help_and_version_load_no_heavy_library(words):
    code = "import sys; from mcseg.run.main import main; main(sys.argv[1:]); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"torch", "numpy", "pytorch_lightning", "jsonargparse", "torchmetrics", "PIL"}
    assert not heavy & set(loaded)


def test_public_names_are_available():
    import mcseg

    for name in mcseg.__all__:
        assert getattr(mcseg, name) is not None
    assert set(mcseg.__all__) <= set(dir(mcseg))  # tab completion
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mcseg.nonsense


def test_ignore_index_is_the_same_everywhere():
    import inspect

    from mcseg.data import IGNORE_INDEX as in_data
    from mcseg.evaluation import IGNORE_INDEX as in_callbacks
    from mcseg.losses import MarginCalibrationLoss

    assert in_data == in_callbacks == inspect.signature(MarginCalibrationLoss).parameters["ignore_index"].default == 255


def test_environment_yml_has_the_bounds_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = {
        text.replace("[signatures]", "").replace("torch>=", "pytorch>=", 1)
        if text.startswith("torch>=")
        else text.replace("[signatures]", "")
        for text in project["dependencies"]
    }
    conda = {entry for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"] if entry != "pip"}
    assert conda == expected | {"python" + project["requires-python"]}


def test_every_dependency_has_a_reason():
    lines = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("\n]")[0].splitlines()[1:]
    for line, above in zip(lines[1:], lines, strict=False):
        if line.strip().startswith('"'):
            assert above.strip().startswith("#"), line


def test_license_and_version_agree():
    import mcseg

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mcseg.__version__
    assert project["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]["doi"] == "10.1007/s11263-021-01533-0"
