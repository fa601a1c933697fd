"""The wheel contains the whole package and works without the repository."""

import os
import re
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="needed to build the wheel: pip install -e .[dev]")

ROOT = Path(__file__).parents[1]


def output(*command, **options):
    """Run a command and return its output on both streams."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    output(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, ROOT)
    (path,) = folder.glob("mcseg-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Virtual environment with the wheel and the dependencies of the tests' environment.

    A .pth file adds the folder of the dependencies. Python does not read .pth files in a folder added this way, so an
    editable installation of the repository, which uses one, stays invisible.
    """
    folder = tmp_path_factory.mktemp("environment")
    output(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    home = output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    Path(home, "libraries.pth").write_text("\n".join(sorted(libraries)))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    output(*pip, "--disable-pip-version-check", "--ignore-installed", wheel)
    return folder


def test_wheel_contains_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mcseg").rglob("*") if path.is_file()}
    assert files == {name for name in expected if "__pycache__" not in name}
    for name in ("configs/objectives/default.yaml", "data/facts/camvid.toml", "sweeps/margin_calibration.yaml", "py.typed"):
        assert f"mcseg/{name}" in files
    assert "License-Expression: MIT" in metadata
    assert "Project-URL: Source, https://" in metadata


@pytest.mark.slow
def test_wheel_trains_without_the_repository(environment, tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    options = {"cwd": tmp_path, "env": variables | {"OMP_NUM_THREADS": "1"}}
    where = output(environment / "bin" / "python", "-c", "import mcseg; print(mcseg.__file__)", **options)
    assert Path(where.strip()).is_relative_to(environment)
    listed = output(environment / "bin" / "mcseg", "--help", **options)
    recipes = (ROOT / "mcseg" / "configs").rglob("*.yaml")
    names = re.search(r"recipes that come with mcseg: (.*)", listed)[1].split(", ")
    assert set(names) == {path.relative_to(ROOT / "mcseg/configs").with_suffix("").as_posix() for path in recipes}
    printed = output(environment / "bin" / "mcseg", "fit", "synthetic", "--trainer.fast_dev_run", "true", **options)
    assert "val: mIoU" in printed
    assert str(ROOT) not in printed
