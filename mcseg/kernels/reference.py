"""The calibrated log-loss per pixel, written to be read; autograd derives the gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_pixel_loss(
    logits: Tensor, target: Tensor, foreground: Tensor, background: Tensor, foreground_weight: float, ignore_index: int
) -> Tensor:
    """Compute the loss of every pixel; arguments as in `mcseg.kernels.pixel_loss`, target int64, offsets converted."""
    void = (target == ignore_index).unsqueeze(1)  # (N, 1, *spatial)
    label = target.unsqueeze(1).masked_fill(void, 0)
    # void logits are replaced before any arithmetic: 0 * nan would be nan in the backward pass
    z = logits.to(foreground.dtype).masked_fill(void, 0.0)

    num_classes = z.shape[1]
    per_class = (-1, *[1] * (z.ndim - 2))
    classes = torch.arange(num_classes, device=z.device).view(per_class)  # (C, 1, ...)

    top, first = z.max(dim=1, keepdim=True)
    runner_up, _ = z.masked_fill(classes == first, -torch.inf).max(dim=1, keepdim=True)
    margin = z - torch.where(classes == first, runner_up, top)

    miss = _softplus(foreground[label] - margin)
    false_alarm = _softplus(background.view(per_class) + margin)
    loss = torch.where(classes == label, foreground_weight * miss, false_alarm).sum(dim=1, keepdim=True) / num_classes
    return loss.masked_fill(void, 0.0).squeeze(1)


def _softplus(x: Tensor) -> Tensor:
    # F.softplus switches to the identity beyond a threshold, too early for float64; logsigmoid is exact to rounding
    return -F.logsigmoid(-x)
