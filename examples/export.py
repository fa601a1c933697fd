"""Export a trained network.

    python examples/export.py                                             # trains briefly first
    python examples/export.py runs/folder/<time>/checkpoints/best.ckpt

The exported file needs only PyTorch.
"""

import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.export import Dim

from mcseg import SegmentationModule, SyntheticData

folder = Path(tempfile.mkdtemp())
if sys.argv[1:]:
    checkpoint = sys.argv[1]
else:
    pl.seed_everything(0)
    data = SyntheticData(16, 8, size=(64, 96), crop_size=(64, 96), batch_size=8, num_workers=0)
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(SegmentationModule("unet", "resnet18", num_classes=data.num_classes), data)
    checkpoint = folder / "trained.ckpt"
    trainer.save_checkpoint(checkpoint)

# Normalisation is part of the network: images are RGB, uint8 0..255 (as here) or floating point 0..1
network = SegmentationModule.load_from_checkpoint(checkpoint, map_location="cpu").network.eval()
example = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)  # height and width are fixed, the number of images is free
program = torch.export.export(network, (example,), dynamic_shapes=({0: Dim("images")},))
torch.export.save(program, folder / "network.pt2")

# Elsewhere, without mcseg:
exported = torch.export.load(folder / "network.pt2").module()
images = torch.randint(0, 256, (5, 3, 64, 96), dtype=torch.uint8)
with torch.inference_mode():
    difference = (exported(images) - network(images)).abs().max()
print(f"{folder / 'network.pt2'}: {(folder / 'network.pt2').stat().st_size / 2**20:.0f} MiB")
print(f"largest difference of the logits: {difference:.1e}")
