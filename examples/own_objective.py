"""Train with your own objective: any ``nn.Module`` that computes a scalar from logits and target.

    python examples/own_objective.py

On the command line, give the import path of the class, from the folder of its file:
``cd examples; mcseg fit synthetic --model.objective own_objective.PolyLoss --model.objective.epsilon 2``.
"""

import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mcseg import JaccardCallback, SegmentationModule, SyntheticData


class PolyLoss(nn.Module):
    """Cross entropy plus ``epsilon`` times 1 - p of the target class; Leng et al., "PolyLoss", ICLR 2022.

    Checkpoints store the constructor's arguments, so these must be plain numbers, strings, lists or dictionaries.
    ``mcseg.losses.ObjectiveProtocol`` lists optional methods of an objective, for example ``calibrate(class_pixels)``.
    """

    def __init__(self, epsilon: float = 1.0) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute a scalar from logits (N,C,H,W) and target (N,H,W): classes 0..C-1, or 255 for void pixels."""
        losses = F.cross_entropy(logits, target, ignore_index=255, reduction="none")  # (N,H,W), 0 for void pixels
        losses = losses + self.epsilon * (1 - torch.exp(-losses))
        return losses.sum() / (target != 255).sum().clamp(min=1)  # 0 if no pixel is labelled


if __name__ == "__main__":
    # A checkpoint names the class by its file. Under the name __main__ no other program would find it.
    from own_objective import PolyLoss

    pl.seed_everything(0)
    data = SyntheticData(48, 8, size=(64, 96), crop_size=(64, 96), batch_size=8, num_workers=0)
    module = SegmentationModule("unet", "resnet18", num_classes=data.num_classes, objective=PolyLoss(epsilon=2.0))
    trainer = pl.Trainer(max_epochs=2, callbacks=[JaccardCallback()], logger=False, enable_checkpointing=False)
    trainer.fit(module, data)  # prints the scores of each class

    checkpoint = Path(tempfile.mkdtemp()) / "trained.ckpt"
    trainer.save_checkpoint(checkpoint)
    again = SegmentationModule.load_from_checkpoint(checkpoint)
    print(f"objective of the checkpoint: {type(again.objective).__name__} with epsilon {again.objective.epsilon}")
