"""Predict the labels of an image with the network of a checkpoint.

    python examples/predict.py                                                      # trains briefly first
    python examples/predict.py runs/folder/<time>/checkpoints/best.ckpt photo.jpg

For whole folders: ``mcseg predict CKPT --images new_photos``.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from mcseg import SegmentationModule, SyntheticData
from mcseg.evaluation import Inference

folder = Path(tempfile.mkdtemp())
if sys.argv[1:]:
    checkpoint, photo = sys.argv[1:]
else:
    pl.seed_everything(0)
    data = SyntheticData(32, 8, size=(64, 96), crop_size=(64, 96), batch_size=8, num_workers=0)
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(SegmentationModule("unet", "resnet18", num_classes=data.num_classes), data)
    checkpoint, photo = folder / "trained.ckpt", folder / "photo.png"
    trainer.save_checkpoint(checkpoint)
    Image.fromarray(data.reader.image(data.samples("test")[0]).permute(1, 2, 0).numpy()).save(photo)

module = SegmentationModule.load_from_checkpoint(checkpoint, map_location="cpu").eval()
names = torch.load(checkpoint, map_location="cpu", weights_only=True)["class_names"]
image = torch.from_numpy(np.array(Image.open(photo).convert("RGB"))).permute(2, 0, 1)  # (3,H,W) uint8, any size

with torch.inference_mode():
    logits = module(image[None])  # (1,C,H,W)
    labels = logits.argmax(1)[0].to(torch.uint8)  # (H,W)
    # For large images: average the probabilities of overlapping windows, and of their mirror images
    inference = Inference(window=(48, 48), flip=True)
    averaged = inference(module, image[None], size=image.shape[-2:])[0]  # (H,W)

for index, name in enumerate(names):
    print(f"{name:<12}{100 * (labels == index).float().mean():6.1f} % of the pixels")
print(f"windows and mirroring change {100 * (labels != averaged).float().mean():.1f} % of the labels")
Image.fromarray(averaged.numpy()).save(folder / "mask.png")
print(f"class indices as a grey image: {folder / 'mask.png'}")
