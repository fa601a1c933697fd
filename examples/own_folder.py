"""Train on your own folder of images and masks with a list of the classes.

    python examples/own_folder.py            # draws a small folder of photos first
    python examples/own_folder.py photos     # uses your folder

The same without Python: ``mcseg fit --config folder --data.root photos``.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

from mcseg import FolderData, JaccardCallback, SegmentationModule


def draw_photos(root: Path) -> None:
    """Draw 30 photos of coins on a table. Labels: 0 table, 1 gold, 2 silver, 255 (void) for the rim of each coin."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :96]
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("table\ngold\nsilver\n")
    colors = np.array([[90, 60, 40], [210, 170, 50], [180, 185, 190]])
    for photo in range(30):
        mask = np.zeros((64, 96), dtype=np.uint8)
        for kind in (1, 1, 2):
            row, column, radius = random.integers([8, 8, 6], [56, 88, 12])
            distance = np.hypot(rows - row, columns - column)
            mask[distance < radius] = 255
            mask[distance < radius - 1] = kind
        pixels = colors[np.where(mask == 255, 0, mask)] + random.normal(0, 25, (64, 96, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{photo:02}.jpg")
        Image.fromarray(mask).save(root / "masks" / f"{photo:02}.png")


output = Path(tempfile.mkdtemp())
root = Path(sys.argv[1]) if sys.argv[1:] else output / "photos"
if not sys.argv[1:]:
    draw_photos(root)

pl.seed_everything(0)
data = FolderData(root, batch_size=4, crop_size=(64, 64), num_workers=0)  # one fifth of the images is used for validation
module = SegmentationModule("unet", "resnet18", num_classes=data.num_classes)
best = ModelCheckpoint(output, monitor="val/miou", mode="max")  # mIoU over the whole validation split
trainer = pl.Trainer(max_epochs=6, callbacks=[JaccardCallback(), best], logger=False, enable_model_summary=False)
trainer.fit(module, data)  # prints the scores of the last epoch at the end

print(f"best epoch: mIoU {100 * best.best_model_score:.1f} %, checkpoint {best.best_model_path}")
