"""Train with two processes on the CPU. On GPUs, omit ``accelerator`` and set ``devices`` to their number.

    python examples/two_processes.py

The Trainer starts this script a second time. Gradients, losses and scores equal those of one process with all images of a
step. The same from the command line: ``mcseg fit synthetic --trainer.accelerator cpu --trainer.devices 2``.
"""

import warnings

import pytorch_lightning as pl
import torch

from mcseg import JaccardCallback, SegmentationModule, SyntheticData

# The scores come from counts that are already summed over processes
warnings.filterwarnings("ignore", message=".*when logging on epoch level in distributed setting.*")

pl.seed_everything(0)
data = SyntheticData(
    train_scenes=32,
    val_scenes=7,  # four per process; one scene occurs twice but is scored once
    size=(64, 96),
    crop_size=(64, 96),
    total_batch_size=8,  # over both processes, so four per process
    num_workers=0,
)
module = SegmentationModule("unet", "resnet18", num_classes=data.num_classes)
scores = JaccardCallback()
trainer = pl.Trainer(
    max_epochs=2,
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    callbacks=[scores],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, data)  # both processes also run the lines below

first = trainer.strategy.broadcast(module.state_dict())
equal = all(torch.equal(first[name], value) for name, value in module.state_dict().items() if "running" not in name)
print(f"process {trainer.global_rank} of {trainer.world_size}: same weights as process 0: {equal}", flush=True)
if trainer.is_global_zero:
    pixels = scores.scores["val"].confusion.sum()  # rows: target, columns: prediction; of both processes
    print(f"{pixels} of {7 * 64 * 96} validation pixels scored, the rest is void")
