"""Measure how much the data pipeline costs on top of merely decoding the files.

    python benchmarks/data.py --root CAMVID [--config camvid] [--workers 2] [--seconds 20]

Three loaders with the same workers, alternating: one decodes image and mask of a training sample with Pillow and drops
them in the worker, one decodes and delivers them as batches, and the last gives the training batches of the recipe. Prints
samples per second and the ratio to either.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mcseg.cli import RECIPES
from mcseg.data import CamVidData
from mcseg.data.files import Sample


class Decoded(Dataset[object]):
    """Decodes the image (as RGB) and the mask with Pillow, and gives them on as tensors or drops them."""

    def __init__(self, samples: list[Sample], deliver: bool) -> None:
        self.samples = samples
        self.deliver = deliver

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> object:
        sample = self.samples[index]
        assert sample.mask is not None
        with Image.open(sample.image) as image, Image.open(sample.mask) as mask:
            pixels, labels = np.array(image.convert("RGB")), np.array(mask)
        return (
            (torch.from_numpy(pixels), torch.from_numpy(labels))
            if self.deliver
            else int(pixels[0, 0, 0]) + int(labels[0, 0])
        )


def rate(loader: "DataLoader[object]", seconds: float) -> float:
    """Samples per second over whole passes, after the workers have started."""
    for _ in loader:
        break
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for batch in loader:
            first: Any = batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list) else batch
            count += len(first)
    return count / (time.perf_counter() - start)


def main() -> None:
    """Run the comparison and print a line per loader."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--config", default="camvid")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    options = yaml.safe_load((RECIPES / f"{args.config}.yaml").read_text())["data"]["init_args"]
    data = CamVidData(**{**options, "root": args.root, "num_workers": args.workers})
    data.setup("fit")
    batch_size = data.batch_size
    loaders: dict[str, DataLoader[object]] = {
        name: DataLoader(
            Decoded(data.samples("train"), deliver),
            batch_size,
            shuffle=True,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
        )
        for name, deliver in (("decode, drop", False), ("decode, deliver", True))
    }
    loaders["training batches"] = data.train_dataloader()
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(args.repeats):
        for name, loader in loaders.items():
            rates[name].append(rate(loader, args.seconds))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    suffix = data.samples("train")[0].image.suffix
    print(
        f"CamVid {suffix} images, {args.workers} workers on {os.cpu_count()} cores, batch {batch_size}, crop "
        f"{options['crop_size']}; torch {torch.__version__}, Pillow {PIL.__version__}, Python {platform.python_version()}"
    )
    for name, value in middle.items():
        print(
            f"{name:<17} {value:8.1f} samples/s   {value / middle['decode, drop']:.2f}x of dropping"
            f"   {value / middle['decode, deliver']:.2f}x of delivering"
        )


if __name__ == "__main__":
    main()
