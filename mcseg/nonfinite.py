"""What a training does about a loss that is NaN or infinite: stop, or leave the batch out."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

OnNonFinite = Literal["stop", "skip"]
_SHOWN = 10  # batches that the summary names


class LossGuard:
    """Watches the loss of each training step.

    With ``"stop"`` the loss of a step is looked at one step later, so that the host does not wait for the GPU in each step;
    with ``"skip"`` the host waits, as all processes have to leave out the same steps.

    Args:
        on_nonfinite: ``"stop"`` or ``"skip"``.

    Raises:
        ValueError: another policy.
    """

    def __init__(self, on_nonfinite: OnNonFinite) -> None:
        if on_nonfinite not in get_args(OnNonFinite):
            raise ValueError(f"on_nonfinite: found {on_nonfinite!r}, expected 'stop' or 'skip'")
        self._skips = on_nonfinite == "skip"
        self._last: tuple[Tensor, str, int] | None = None  # loss, names of the batch's images, step
        self._skipped: list[str] = []

    def accepts(self, loss: Tensor, names: Sequence[str], step: int) -> bool:
        """Note the loss of a step; False if the step is to be left out, by all processes of a group if one has a bad loss.

        Args:
            loss: scalar of this process.
            names: of the batch's images.
            step: optimiser steps done.
        """
        shown = ", ".join(names) or "(without names)"
        if not self._skips:
            self._last = (loss.detach(), shown, step)
            return True
        bad = (~loss.detach().isfinite()).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad)
        if bad:
            self._skipped.append(shown)
        return not bad

    def check(self) -> None:
        """Look at the last loss noted; to be called before the next step, and before weights go into a checkpoint.

        Raises:
            RuntimeError: it is not finite, and the policy is to stop.
        """
        last, self._last = self._last, None
        if last is None or last[0].isfinite():
            return
        value, names, step = last
        raise RuntimeError(
            f"train/loss is {float(value)} in step {step}, of the images {names}; the current weights are unusable, the "
            "last checkpoint is intact. Lower the learning rate or clip gradients (trainer.gradient_clip_val), look at "
            "these images (mcseg check), or set model.on_nonfinite to skip"
        )

    def summarize(self) -> None:
        """Warn of the batches that were left out, and forget them."""
        if self._skipped:
            shown = "; ".join(self._skipped[:_SHOWN]) + ("; ..." if len(self._skipped) > _SHOWN else "")
            rank_zero_warn(f"{len(self._skipped)} steps were skipped, as the loss was not finite, of the images: {shown}")
        self._skipped = []
