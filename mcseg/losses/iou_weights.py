"""Log errors at calibrated margins, weighted by running IoU counts so that their sum follows mIoU."""

import torch
from torch import Tensor

from mcseg.kernels import Upsampling, confusion_counts, predicted_classes, weighted_pixel_loss
from mcseg.losses.base import as_upsampling, check_range, mean_over_processes, summed_over_processes
from mcseg.losses.margin import MarginLoss, check_margin_inputs
from mcseg.margins import MarginOffsets, margin_offsets


class IoUWeightedLoss(MarginLoss):
    r"""Log errors of misses and false alarms, weighted by what each of them costs in mIoU at the moment.

    With class margins ``s_k = z_k - max_{j != k} z_j``, offsets of scheme ``"miou"`` and label ``y``, the mean over labelled
    pixels of::

        u_y * softplus(foreground_y - s_y) + sum_{k != y} v_k * softplus(background_k + s_k)

    With p_i the share of class i, a_i and b_i those of its misses and false alarms, and IoU_i, all of the current model::

        d mIoU = -(1/C) sum_i [d a_i + IoU_i d b_i] / (p_i + b_i)

    so u_i is 1 / (p_i + b_i), scaled so that sum_i u_i p_i = 1, and v_i is u_i max(IoU_i, 0.1). The counts are those of the
    training batches so far, of all processes, with weights that fade by ``decay`` a step.

    Args:
        num_classes: C >= 2.
        max_margin: Largest offset, > 0, in logit units, see `mcseg.margins.margin_offsets`.
        decay: Share of the running counts that a step keeps, 0 <= decay < 1.
        ignore_index: Label of void pixels.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Attributes:
        foreground_offsets: Buffer, float64 ``(C,)``, NaN until calibrated.
        background_offsets: Buffer, likewise.
        running_shares: Buffer, float64 ``(3, C)``: shares of labels, hits and predictions, see `confusion_shares`.
        class_statistics: ``running_iou``, ``miss_weight`` and ``false_alarm_weight``.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> import torch
        >>> from mcseg.losses import IoUWeightedLoss
        >>> logits, target = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0, 1])
        >>> loss = IoUWeightedLoss(num_classes=2).calibrate([900, 100])
        >>> loss(logits, target)
        tensor(0.7389)
    """

    running_shares: Tensor

    def __init__(
        self,
        num_classes: int,
        max_margin: float = 1.0,
        decay: float = 0.95,
        ignore_index: int = 255,
        backend: str = "auto",
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: found {decay}, expected 0 <= decay < 1")
        check_range("max_margin", max_margin, 0, open_=True)
        super().__init__(num_classes, ignore_index, backend)
        self.max_margin = max_margin
        self.decay = decay

    def forward(self, logits: Tensor, target: Tensor, upsample: bool | Upsampling = False) -> Tensor:
        """Compute the loss; arguments and errors as of `mcseg.losses.MarginCalibrationLoss`.

        Returns:
            Scalar >= 0 in float32, or float64 for logits of that type; 0 where nothing is labelled.
        """
        upsampling = as_upsampling(upsample, target)
        check_margin_inputs(logits, target, self.offsets, upsampling)
        target = target.long()
        if self.training:
            found = confusion_shares(logits, target, self.ignore_index, upsampling)
            self.running_shares.copy_(self.decay * self.running_shares + (1 - self.decay) * found)
        misses, false_alarms = iou_weights(self.running_shares)
        self.class_statistics = {
            "running_iou": class_iou(self.running_shares),
            "miss_weight": misses,
            "false_alarm_weight": false_alarms,
        }
        pixels = weighted_pixel_loss(
            logits,
            target,
            *self.offsets,
            misses,
            false_alarms,
            ignore_index=self.ignore_index,
            backend=self.backend,
            upsampling=upsampling,
        )
        return mean_over_processes(pixels.sum(), (target != self.ignore_index).sum())

    def _offsets(self, n: Tensor) -> MarginOffsets:
        return margin_offsets(n, "miou", max_margin=self.max_margin)

    def _reset_buffers(self) -> None:
        super()._reset_buffers()
        # goes on where a run is resumed
        self.register_buffer("running_shares", torch.zeros(3, self.num_classes or 0, dtype=torch.float64))


def confusion_shares(logits: Tensor, target: Tensor, ignore_index: int, upsampling: Upsampling | None = None) -> Tensor:
    """Count labels, hits and predictions of a batch, over all processes of a group, as shares of the labelled pixels.

    Returns:
        ``(3, C)`` float64, without gradient: share of the pixels that are labelled i, that are so and predicted so, and
        that are predicted i. All 0 where nothing is labelled.
    """
    preds = predicted_classes(logits, target.shape[-2:] if upsampling else None, upsampling)
    confusion, _ = confusion_counts(preds, target, logits.shape[1], ignore_index)
    found = summed_over_processes(torch.stack([confusion.sum(1), confusion.diagonal(), confusion.sum(0)]).double())
    return found / found[0].sum().clamp(min=1)


def class_iou(shares: Tensor) -> Tensor:
    """IoU ``(C,)`` of ``(3, C)`` shares as from `confusion_shares`, NaN without a label or a prediction."""
    labels, hits, predictions = shares.unbind()
    return hits / (labels + predictions - hits)


def iou_weights(shares: Tensor, floor: float = 0.1) -> tuple[Tensor, Tensor]:
    """Derive the weights u of misses and v of false alarms, see `IoUWeightedLoss`.

    Args:
        shares: ``(3, C)`` as from `confusion_shares`, or a multiple.
        floor: Smallest IoU that weighs false alarms.

    Returns:
        ``(C,)`` weights of misses and of false alarms. Classes without a label so far have both 0.
    """
    labels, hits, predictions = (shares / shares[0].sum().clamp(min=torch.finfo(shares.dtype).tiny)).unbind()
    union = labels + predictions - hits
    misses = torch.where(labels > 0, 1 / union.clamp(min=1e-12), 0.0)
    misses = misses / (misses * labels).sum().clamp(min=1e-12)
    return misses, misses * (hits / union.clamp(min=1e-12)).clamp(min=floor)
