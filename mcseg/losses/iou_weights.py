"""Log errors at calibrated margins, with class weights from running IoU counts so that the loss follows mIoU."""

import torch
from torch import Tensor

from mcseg.kernels import Upsampling, confusion_counts, predicted_classes, weighted_pixel_loss
from mcseg.losses.base import as_upsampling, check_range, mean_over_processes, summed_over_processes
from mcseg.losses.margin import MarginLoss, check_margin_inputs
from mcseg.margins import MarginOffsets, margin_offsets


class IoUWeightedLoss(MarginLoss):
    r"""Log errors of misses and false alarms, weighted by their current cost in mIoU.

    With class margins ``s_k = z_k - max_{j != k} z_j``, offsets of scheme ``"miou"`` and label ``y``, the loss is the mean
    over labelled pixels of::

        u_y * softplus(foreground_y - s_y) + sum_{k != y} v_k * softplus(background_k + s_k)

    The weights ``u`` of misses and ``v`` of false alarms follow from the derivative of mIoU. Let ``p_i`` be the share of
    the pixels labelled i, and ``a_i``, ``b_i`` the shares that are misses and false alarms of class i. Then::

        d mIoU = -(1/C) sum_i [d a_i + IoU_i d b_i] / (p_i + b_i)

    so ``u_i = 1 / (p_i + b_i)``, scaled to ``sum_i u_i p_i = 1``, and ``v_i = u_i max(IoU_i, 0.1)``. The shares are
    exponential averages over the training batches of all processes.

    Args:
        num_classes: C >= 2.
        max_margin: Largest offset in logit units, > 0, see `mcseg.margins.margin_offsets`.
        decay: Weight of the old average in a training step, 0 <= decay < 1.
        ignore_index: Label of void pixels.
        backend: ``"auto"``, ``"fused"``, ``"reference"`` or ``"triton"``, see `mcseg.kernels`.

    Attributes:
        foreground_offsets: Buffer, float64 ``(C,)``, NaN until calibrated.
        background_offsets: Buffer, float64 ``(C,)``, NaN until calibrated.
        running_shares: Buffer, float64 ``(3, C)``: averaged shares of labels, hits and predictions, see
            `mcseg.losses.iou_weights.confusion_shares`.
        class_statistics: ``running_iou``, ``miss_weight`` and ``false_alarm_weight``, ``(C,)`` each.

    Raises:
        ValueError: A setting is out of range.

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
        """Compute the loss, and update the running shares in training mode.

        Args:
            logits: ``(N, C, *spatial)`` floating point, unbounded scores.
            target: ``(N, *spatial)`` integers, ``0..C-1`` or ``ignore_index``.
            upsample: Whether to upsample coarse logits, and how; see `mcseg.losses.margin_calibration_loss`.

        Returns:
            Scalar >= 0 in float32, or in float64 for float64 logits; 0 if nothing is labelled.

        Raises:
            RuntimeError: The loss is not calibrated.
            TypeError: Logits are not floating point, or the target is not of an integer dtype.
            ValueError: Shapes or numbers of classes do not match, or (CPU only) a label is neither a class nor
                ``ignore_index``.
        """
        upsampling = as_upsampling(upsample, target)
        check_margin_inputs(logits, target, self.offsets, upsampling)
        target = target.long()
        if self.training:
            shares = confusion_shares(logits, target, self.ignore_index, upsampling)
            self.running_shares.copy_(self.decay * self.running_shares + (1 - self.decay) * shares)
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
        self.register_buffer("running_shares", torch.zeros(3, self.num_classes or 0, dtype=torch.float64))


def confusion_shares(logits: Tensor, target: Tensor, ignore_index: int, upsampling: Upsampling | None = None) -> Tensor:
    """Compute the shares of labels, hits and predictions in a batch, over all processes of a group.

    Args:
        logits: ``(N, C, *spatial)`` floating point.
        target: ``(N, *spatial)`` int64, ``0..C-1`` or ``ignore_index``.
        ignore_index: Label of void pixels.
        upsampling: Upsampling of the logits to the target, or None.

    Returns:
        ``(3, C)`` float64, without gradient: the shares of the labelled pixels that are labelled i, that are labelled and
        predicted i, and that are predicted i. All 0 if nothing is labelled.
    """
    preds = predicted_classes(logits, target.shape[-2:] if upsampling else None, upsampling)
    confusion, _ = confusion_counts(preds, target, logits.shape[1], ignore_index)
    counts = summed_over_processes(torch.stack([confusion.sum(1), confusion.diagonal(), confusion.sum(0)]).double())
    return counts / counts[0].sum().clamp(min=1)


def class_iou(shares: Tensor) -> Tensor:
    """Compute the IoU ``(C,)`` from shares ``(3, C)`` of `confusion_shares`; NaN without labels and predictions."""
    labels, hits, predictions = shares.unbind()
    return hits / (labels + predictions - hits)


def iou_weights(shares: Tensor, floor: float = 0.1) -> tuple[Tensor, Tensor]:
    """Compute the weights u of misses and v of false alarms, see `mcseg.losses.IoUWeightedLoss`.

    Args:
        shares: ``(3, C)`` shares of `confusion_shares`, or a multiple of them.
        floor: Lower limit of the IoU in the weights of false alarms.

    Returns:
        Weights ``(C,)`` of misses and of false alarms. Both are 0 for a class that has no labels yet.
    """
    labels, hits, predictions = (shares / shares[0].sum().clamp(min=torch.finfo(shares.dtype).tiny)).unbind()
    union = labels + predictions - hits
    misses = torch.where(labels > 0, 1 / union.clamp(min=1e-12), 0.0)
    misses = misses / (misses * labels).sum().clamp(min=1e-12)
    return misses, misses * (hits / union.clamp(min=1e-12)).clamp(min=floor)
