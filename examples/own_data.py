"""Read a data set with its own layout: a subclass names the classes and lists the samples.

    python examples/own_data.py

On the command line, from this folder: ``mcseg fit --data own_data.ScansData --data.root scans``.
Folders ``images`` and ``masks`` with equal file names need no subclass: see ``own_folder.py``.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image

from mcseg import JaccardCallback, SegmentationData, SegmentationModule
from mcseg.data import LabelTable
from mcseg.data.files import Sample


class ScansData(SegmentationData):
    """Scans in ``root/<patient>/<number>_scan.png``, labels in ``<number>_labels.png``: 0, 10, 20, and 99 for void."""

    def __init__(self, root: str | Path, **options: Any) -> None:
        table = LabelTable(
            names=("background", "tissue", "lesion"),
            palette=((0, 0, 0), (90, 160, 90), (230, 60, 60)),
            raw_ids={0: 0, 10: 1, 20: 2, 99: 255},  # value in the file -> class; other values are errors
        )
        super().__init__(table, root, **options)

    def samples(self, split: str) -> list[Sample]:
        """List the samples of a split: patients 8 and 9 for ``val``, all other patients for ``train``, none for ``test``."""
        patients = {"train": "[0-7]", "val": "[89]", "test": ""}[split]
        samples = []
        for scan in sorted(self.root.glob(f"{patients}/*_scan.png")) if patients else []:
            labels = scan.with_name(scan.name.replace("_scan", "_labels"))
            samples.append(Sample(name=f"{scan.parent.name}-{scan.stem}", image=scan, mask=labels))
        return samples


if __name__ == "__main__":
    random, root = np.random.default_rng(0), Path(tempfile.mkdtemp())
    rows, columns = np.mgrid[:64, :64] - 32
    for patient in range(10):
        (root / str(patient)).mkdir()
        for number in range(2):
            labels = np.where(np.hypot(rows, columns) < random.integers(18, 28), 10, 0)
            labels[np.hypot(rows - random.integers(-8, 8), columns - random.integers(-8, 8)) < 6] = 20
            pixels = (40 + 7 * labels + random.normal(0, 20, labels.shape)).clip(0, 255)
            labels[:2] = 99
            for kind, values in (("scan", pixels), ("labels", labels)):
                Image.fromarray(values.astype(np.uint8)).save(root / str(patient) / f"{number}_{kind}.png")

    pl.seed_everything(0)
    data = ScansData(root, batch_size=4, crop_size=(64, 64), num_workers=0)
    module = SegmentationModule("unet", "resnet18", num_classes=data.num_classes)
    pl.Trainer(max_epochs=5, callbacks=[JaccardCallback()], logger=False, enable_checkpointing=False).fit(module, data)
    print(f"training pixels: {dict(zip(data.class_names, data.class_pixels().tolist(), strict=True))}")
