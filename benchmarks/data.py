"""Measure the time of the data pipeline relative to decoding the files alone, and its memory.

    python benchmarks/data.py cityscapes                 2048x1024 PNGs, crops of 768x768
    python benchmarks/data.py mapillary                  JPEGs and masks of 4000x3000
    python benchmarks/data.py camvid --root CAMVID       480x360

``cityscapes`` and ``mapillary`` generate their files: drawn scenes with camera noise, in the benchmark's layout.

Three loaders with the same number of workers take turns. One decodes image and mask of a training sample with Pillow and
drops them in the worker, one decodes and delivers them, and one delivers the recipe's training batches. The same is then
measured for masks alone: decoding, and ``class_pixels``. Prints samples per second, ratios, and the memory of all processes
together (proportional set size, which counts shared pages once).
"""

import argparse
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import yaml
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.trainer.states import TrainerStatus
from torch.utils.data import DataLoader, Dataset

from mcseg.data import BenchmarkData, CamVidData, CityscapesData, MapillaryVistasData
from mcseg.data.files import Sample
from mcseg.data.scenes import draw_scene
from mcseg.data.statistics import count_class_pixels
from mcseg.run.recipes import RECIPES


class Decoded(Dataset[object]):
    """Decode the image (as RGB) and the mask with Pillow, and return them as tensors or drop them."""

    def __init__(self, samples: list[Sample], deliver: bool, images: bool = True) -> None:
        self.samples = samples
        self.deliver = deliver
        self.images = images

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> object:
        sample = self.samples[index]
        assert sample.mask is not None
        with Image.open(sample.mask) as file:
            labels = np.array(file)
        if not self.images:
            return int(labels[0, 0])
        with Image.open(sample.image) as file:
            pixels = np.array(file.convert("RGB"))
        if self.deliver:
            return torch.from_numpy(pixels), torch.from_numpy(labels)
        return int(pixels[0, 0, 0]) + int(labels[0, 0])


def rate(loader: Iterable[object], seconds: float) -> float:
    """Return samples per second over whole passes, after the workers have started."""
    for _ in loader:
        break
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for batch in loader:
            first: Any = batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list) else batch
            count += len(first)
    return count / (time.perf_counter() - start)


def seconds_of(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class PeakMemory:
    """Peak proportional set size, in GB, of this process and its children while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self._end = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self.peak = max(self.peak, sum(_proportional_set(pid) for pid in _family(os.getpid())))


def _family(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = {int(child) for task in tasks for child in (task / "children").read_text().split()}
    except OSError:  # the process ended
        return [pid]
    return [pid, *(member for child in children for member in _family(child))]


def _proportional_set(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e6


def draw(root: Path, name: str, count: int) -> None:
    """Write ``count`` training pairs and one validation pair with drawn content, in the layout and size of the benchmark."""
    rng = np.random.default_rng(0)
    for index in range(count + 1):
        split = "train" if index < count else "val"
        if name == "cityscapes":
            image, labels = draw_scene((index,), 1024, 2048)
            files = (
                root / f"leftImg8bit/{split}/city/city_{index:06d}_000019_leftImg8bit.png",
                root / f"gtFine/{split}/city/city_{index:06d}_000019_gtFine_labelIds.png",
            )
            ids = np.append(np.array([7, 8, 11, 21, 23, 17, 26, 24], np.uint8), np.zeros(248, np.uint8))
        else:
            # A drawn scene of 1000x750, enlarged four times
            image, labels = (
                np.kron(part, np.ones((4, 4, 1)[: part.ndim], np.uint8)) for part in draw_scene((index,), 750, 1000)
            )
            folder = root / {"train": "training", "val": "validation"}[split]
            files = (folder / f"images/{index:022d}.jpg", folder / f"labels/{index:022d}.png")
            ids = np.append(np.array([13, 15, 17, 30, 27, 45, 55, 19], np.uint8), np.full(248, 65, np.uint8))
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(-3, 4, image.shape, dtype=np.int8)
        Image.fromarray(np.clip(image.astype(np.int16) + noise, 0, 255).astype(np.uint8)).save(files[0], quality=90)
        mask = Image.fromarray(ids[labels])
        if name == "mapillary":
            mask.putpalette(bytes(range(256)) * 3)
        mask.save(files[1])


CASES: dict[str, tuple[type[BenchmarkData], str]] = {
    "camvid": (CamVidData, "camvid"),
    "cityscapes": (CityscapesData, "cityscapes"),
    "mapillary": (MapillaryVistasData, "mapillary_vistas"),
}


def main() -> None:
    """Parse the options, generate the files and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--root", type=Path, help="folder of CamVid; the other cases generate their files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, help="default: the recipe's, at most 8")
    parser.add_argument("--images", type=int, default=32, help="number of generated training images")
    parser.add_argument("--epochs", type=int, default=4, help="repetitions of the images in one pass")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.case == "camvid" and args.root is None:
        parser.error("camvid needs --root")
    with tempfile.TemporaryDirectory() as folder:
        root = args.root or Path(folder)
        if args.root is None:
            draw(root, args.case, args.images)
        measure(args, root)


def measure(args: argparse.Namespace, root: Path) -> None:
    """Measure time and memory of the loaders on the files in ``root`` and print a line per loader."""
    kind, recipe = CASES[args.case]
    options = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["data"]["init_args"]
    batch_size = args.batch_size or min(8, options.pop("total_batch_size", options.get("batch_size", 8)))
    options |= {"root": root, "num_workers": args.workers, "batch_size": batch_size, "total_batch_size": None}
    data = kind(**options)
    # Attach a Trainer, so that the loaders give the batches of a training
    data.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    data.trainer.state.status = TrainerStatus.RUNNING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fewer images than in the official split
        data.setup("fit")
    data._splits["train"] *= args.epochs  # longer epochs, since starting one takes time
    samples = data._splits["train"]

    def decoding(deliver: bool, images: bool = True, **loading: Any) -> DataLoader[object]:
        return DataLoader(Decoded(samples, deliver, images), num_workers=args.workers, **loading)

    loaders: dict[str, DataLoader[object]] = {
        name: decoding(deliver, batch_size=batch_size, shuffle=True, persistent_workers=args.workers > 0)
        for name, deliver in (("decode, drop", False), ("decode, deliver", True))
    }
    loaders["training batches"] = data.train_dataloader()
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    with PeakMemory() as training_memory:
        rates["training batches"].append(rate(loaders["training batches"], args.seconds))
    for repeat in range(args.repeats):
        for name, loader in loaders.items():
            if repeat or name != "training batches":
                rates[name].append(rate(loader, args.seconds))
    with Image.open(samples[0].image) as file:
        size, suffix = file.size, samples[0].image.suffix
    print(
        f"{args.case}: {len(samples) // args.epochs} training images, {size[0]}x{size[1]} {suffix}, {args.workers} workers "
        f"on {os.cpu_count()} cores, batch {batch_size}, crop {options['crop_size']}; torch {torch.__version__}, "
        f"Pillow {PIL.__version__}, Python {platform.python_version()}"
    )
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in middle.items():
        print(
            f"{name:<17} {value:8.1f} samples/s   {value / middle['decode, drop']:.2f}x of dropping"
            f"   {value / middle['decode, deliver']:.2f}x of delivering"
        )

    del loader
    loaders.clear()  # stop their workers

    def count() -> None:
        count_class_pixels(data.reader, samples, args.workers, cache_dir=None, progress=False)

    def decode_masks() -> None:
        for _ in decoding(deliver=False, images=False, batch_size=None):
            pass

    with PeakMemory() as counting_memory:
        count()
    times = [(seconds_of(decode_masks), seconds_of(count)) for _ in range(args.repeats)]
    decoded, counted = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"masks: decoding {len(samples) / decoded:.1f}/s, class_pixels {len(samples) / counted:.1f}/s: "
        f"{decoded / counted:.2f}x (including the start of the workers)"
    )
    print(
        f"memory of all processes: {training_memory.peak:.2f} GB with training batches, "
        f"{counting_memory.peak:.2f} GB while counting masks"
    )


if __name__ == "__main__":
    main()
