"""Fixtures: small data sets in real layouts; caches and run folders inside the test's temporary folder."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Set before the hub's library is imported, so that tests do not use weights cached on this machine
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": os.path.join(os.devnull, "hub")}
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton is imported, so that its kernels run on the CPU

SHARED = Path(__file__).parents[2] / "shared"


def golden_cases() -> list[dict[str, np.ndarray]]:
    """Read the reference numbers of tests/golden, a dictionary of arrays for each case; keys in the files are case/array.

    They are in float64, independent of mcseg, and ignore label 255. margin.npz: ``logits`` (N,C,H,W) float32, ``target``
    (N,H,W) int64, ``class_pixels`` (C,) int64, ``tau``, ``upsilon``, and of the paper's method ``foreground_offsets`` and
    ``background_offsets`` (C,), ``margin_loss`` and ``margin_grad`` (N,C,H,W). The other two: Lovász-softmax over the classes
    present, per image and per batch, ``lovasz_softmax_*`` and ``lovasz_grad_*``.
    """
    cases = [{} for _ in range(6)]
    for path in sorted((Path(__file__).parent / "golden").glob("*.npz")):
        for key, values in np.load(path).items():
            number, name = key.split("/")
            cases[int(number)][name] = values
    return cases


LONGEST = ("test_processes.py", "test_cli.py", "test_notebooks.py", "test_resume.py", "test_examples.py", "test_gpu.py")


def pytest_collection_modifyitems(items) -> None:
    """Begin with the longest files: workers take whole files, and none is to be left alone with a long one at the end."""
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def collector():
    """Exclude the libraries' million objects from garbage collection, which took a fifth of the suite's time."""
    import mcseg.run.command  # noqa: F401 - imports the libraries

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Keep caches, run folders and wandb files in the test's temporary folder, and W&B offline."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def write_png(path: Path, values) -> None:
    """Write (H,W) or (H,W,3) integers as a PNG with exactly these stored values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


@pytest.fixture
def camvid_root(tmp_path):
    """CamVid's layout with 9x12 images and hand-written labels: each class, and void as 11."""
    root = tmp_path / "CamVid"
    rng = np.random.default_rng(0)
    row = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    for split, names in {
        "train": ["0001TP_006690", "0006R0_f00930", "0016E5_08430"],
        "val": ["0016E5_07959", "0016E5_07961"],
    }.items():
        for name in names:
            write_png(root / split / f"{name}.png", rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            write_png(root / f"{split}annot" / f"{name}.png", np.array([row] * 9, dtype=np.uint8))
    return root


@pytest.fixture
def photo_folder(tmp_path):
    """A user's folder: 10 JPEG photos of 24x32, PNG index masks of three classes, classes.txt."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(1)
    (root / "images").mkdir(parents=True)
    for index in range(10):
        mask = np.zeros((24, 32), dtype=np.uint8)
        mask[12:] = 1
        mask[4:6, index : index + 3] = 2
        mask[0, 0] = 255
        pixels = (60 * mask[..., None] + rng.integers(0, 40, (24, 32, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"photo {index}.jpg", quality=95)
        write_png(root / "masks" / f"photo {index}.png", mask)
    (root / "classes.txt").write_text("background\nground\nthing\n")
    return root


def break_three(root):
    """Truncate a photo, put an unknown value into a mask, and give another mask the wrong size."""
    photo = root / "images" / "photo 2.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    mask = np.zeros((24, 32), dtype=np.uint8)
    mask[3, 3] = 7
    write_png(root / "masks" / "photo 5.png", mask)
    write_png(root / "masks" / "photo 8.png", np.zeros((12, 32), dtype=np.uint8))


@contextmanager
def at_work(folder):
    """Run another process that holds the lock of a folder; it is killed at the end of the block."""
    script = "import sys; from pathlib import Path; from mcseg.run.folder import exclusive_lock\n"
    script += "with exclusive_lock(Path(sys.argv[1]), 'fit'): print('locked', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        yield
        process.kill()
