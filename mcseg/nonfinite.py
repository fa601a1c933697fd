"""Policy for a training loss that is NaN or infinite: stop, or skip the step."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

OnNonFinite = Literal["stop", "skip"]
_SHOWN = 10  # skipped steps that the summary lists


class LossGuard:
    """Checks that the loss of each training step is finite.

    With ``"stop"``, the loss of a step is read one step later, so that the host does not wait for the GPU in each step.
    With ``"skip"``, the host waits, because all processes have to skip the same steps.

    Args:
        on_nonfinite: ``"stop"`` or ``"skip"``.

    Raises:
        ValueError: unknown policy.
    """

    def __init__(self, on_nonfinite: OnNonFinite) -> None:
        if on_nonfinite not in get_args(OnNonFinite):
            raise ValueError(f"on_nonfinite: found {on_nonfinite!r}, expected 'stop' or 'skip'")
        self._skips = on_nonfinite == "skip"
        self._last: tuple[Tensor, str, int] | None = None  # loss, names of the batch's images, step
        self._skipped: list[str] = []

    def accepts(self, loss: Tensor, names: Sequence[str], step: int) -> bool:
        """Record the loss of a step; with ``"skip"``, return False if it is not finite in any process.

        Args:
            loss: scalar loss of this process.
            names: names of the batch's images.
            step: number of optimiser steps done.
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
        """Check the last recorded loss; call it before the next step and before a checkpoint is written.

        Raises:
            RuntimeError: the loss is not finite, and the policy is ``"stop"``.
        """
        last, self._last = self._last, None
        if last is None or last[0].isfinite():
            return
        value, names, step = last
        raise RuntimeError(
            f"train/loss is {float(value)} in step {step}, images {names}; expected a finite loss. The current weights are "
            "unusable, the last checkpoint is intact. Lower the learning rate or clip gradients "
            "(trainer.gradient_clip_val), check these images (mcseg check), or set model.on_nonfinite to skip"
        )

    def summarize(self) -> None:
        """Warn of the skipped steps, and reset their list."""
        if self._skipped:
            shown = "; ".join(self._skipped[:_SHOWN]) + ("; ..." if len(self._skipped) > _SHOWN else "")
            rank_zero_warn(f"{len(self._skipped)} steps were skipped because the loss was not finite; their images: {shown}")
        self._skipped = []
