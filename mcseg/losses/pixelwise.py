"""Objectives that are a mean over pixels: cross entropy and its relatives."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossEntropyLoss(nn.Module):
    """Cross entropy that is 0 where all is void, which torch's own turns into NaN.

    Args:
        ignore_index: target value of void pixels.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the mean over the labelled pixels.

        Args:
            logits: (N,C,H,W) floating point.
            target: (N,H,W) int64, 0..C-1 or ``ignore_index``.

        Returns:
            Scalar in float32, or float64 for logits of that type.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="sum")
        return total / (target != self.ignore_index).sum().clamp(min=1)
