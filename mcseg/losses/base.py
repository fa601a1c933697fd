"""The protocol of objectives and their base classes: input checks, calibration, float64 buffers, sums over processes.

Class tree, with the part that each base class adds, and the files of the objectives::

    Objective                       forward: check inputs, set void logits to 0, call _loss
      FocalLoss                                                                               pixelwise.py
      CalibratedLoss                calibrate: store _values in buffers
        CountedLoss                 one constant per class, from _terms
          CrossEntropyLoss, LDAMLoss, LogitAdjustmentLoss (BalancedSoftmaxLoss)               pixelwise.py
        MarginLoss                  two offsets per class, from _offsets
          MarginCalibrationLoss     own forward, for coarse logits                            margin.py
          IoUWeightedLoss           own forward, for coarse logits                            iou_weights.py
      RegionLoss                    mean over classes and images, see regions.py
        CountRatioLoss              own forward, for coarse logits
          SmoothedLoss (DiceLoss, JaccardLoss, TverskyLoss), GeneralizedDiceLoss              regions.py
        LovaszSoftmaxLoss                                                                     regions.py
    SumLoss                         weighted sum of any objectives; not an Objective          combine.py
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, cast, get_args

import torch
import torch.distributed
from torch import Tensor, nn

from mcseg.kernels import Upsampling, check_labels
from mcseg.margins import ClassPixels, checked_counts, warn_about_absent_classes


class ObjectiveProtocol(Protocol):
    """Interface between an objective and the module, `SumLoss` and the callbacks.

    Any ``torch.nn.Module`` that takes logits and target is an objective. All other members are optional; `offered` returns
    their defaults for an objective that does not define them.

    Attributes:
        is_calibrated: Whether the objective is ready to be called. Default: True.
        terms: Named parts of the last loss, scalars without gradient; the module logs them. Default: none.
        class_constants: Named constants per class that calibration sets, ``(C,)`` each. Default: none.
        class_statistics: Named statistics per class of the last call, ``(C,)`` each. Default: none.
        takes_coarse_logits: Whether the objective accepts an `mcseg.kernels.Upsampling` as its third argument, with logits
            ``(N, C, h, w)`` that it upsamples to the size of the target. Default: False.
    """

    is_calibrated: bool
    terms: Mapping[str, Tensor]
    class_constants: Mapping[str, Tensor]
    class_statistics: Mapping[str, Tensor]
    takes_coarse_logits: bool

    def __call__(self, logits: Tensor, target: Tensor, /) -> Tensor:
        """Compute a scalar from ``logits (N, C, H, W)`` and ``target (N, H, W)``: 0..C-1, or 255 for void."""
        ...

    def calibrate(self, class_pixels: ClassPixels, /) -> Any:
        """Set constants from the ``(C,)`` pixel counts of the training labels. Without this method nothing is counted."""
        ...


_DEFAULTS: dict[str, Any] = {
    "calibrate": None,
    "is_calibrated": True,
    "terms": {},
    "class_constants": {},
    "class_statistics": {},
    "takes_coarse_logits": False,
}


def offered(objective: nn.Module, name: str) -> Any:
    """Return an optional member of `ObjectiveProtocol` by name, or its default if the objective does not define it."""
    return getattr(objective, name, _DEFAULTS[name])


def calibrate_from_data(objective: nn.Module, datamodule: Any) -> None:
    """Calibrate an objective that needs it with the pixel counts of the training labels.

    Args:
        objective: Objective, see `ObjectiveProtocol`.
        datamodule: Object with a method ``class_pixels`` that returns ``(C,)`` counts, or without it, or None.

    Raises:
        RuntimeError: There are no counts, and the objective is not calibrated yet.
    """
    calibrate = offered(objective, "calibrate")
    if calibrate is None:
        return
    class_pixels = getattr(datamodule, "class_pixels", None)
    if class_pixels is not None:
        calibrate(class_pixels())
    elif not offered(objective, "is_calibrated"):
        raise RuntimeError(
            "the objective is not calibrated and the data module has no class_pixels(); call "
            "module.objective.calibrate(class_pixels) with the pixel counts of the training labels before fit"
        )


def check_inputs(logits: Tensor, target: Tensor, least_classes: int = 1, upsampling: Upsampling | None = None) -> None:
    """Check the dtypes and shapes of logits and target.

    Args:
        logits: ``(N, C, *spatial)``; ``(N, C, h, w)`` if ``upsampling`` is given.
        target: ``(N, *spatial)``; ``(N, H, W)`` if ``upsampling`` is given.
        least_classes: Smallest C.
        upsampling: Upsampling of the logits, or None.

    Raises:
        TypeError: Logits are not floating point, or the target is not of an integer dtype.
        ValueError: The shapes do not match, or C is below ``least_classes``.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits: found dtype {logits.dtype}, expected floating point; pass the network's raw output")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target: found dtype {target.dtype}, expected an integer dtype; convert labels with .long()")
    if logits.ndim < 2 or logits.shape[1] < least_classes:
        least = f" with C >= {least_classes} classes" if least_classes > 1 else ""
        raise ValueError(f"logits: found shape {tuple(logits.shape)}, expected (N, C, *spatial){least}")
    if upsampling is not None:
        if logits.ndim != 4 or target.ndim != 3 or len(target) != len(logits):
            raise ValueError(
                f"upsampling: found logits of shape {tuple(logits.shape)} and target of shape {tuple(target.shape)}, "
                "expected (N, C, h, w) and (N, H, W)"
            )
        if target.shape[1] > upsampling.height or target.shape[2] > upsampling.width:
            raise ValueError(
                f"upsampling: found a target of size {tuple(target.shape[1:])} and logits upsampled to {upsampling[:2]}, "
                "expected a target that is not larger"
            )
        return
    expected = (logits.shape[0], *logits.shape[2:])
    if target.shape != expected:
        raise ValueError(
            f"target: found shape {tuple(target.shape)}, expected {expected} for logits of shape {tuple(logits.shape)}; "
            "pass class indices without a class dimension, and resize the logits to the target"
        )


def as_upsampling(upsample: bool | Upsampling, target: Tensor) -> Upsampling | None:
    """Convert the argument ``upsample``: True upsamples to the size of the target, False returns None."""
    return Upsampling(*target.shape[-2:]) if upsample is True else upsample or None


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ValueError unless ``value`` is one of the values of the Literal type ``choices``."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(map(repr, get_args(choices)))}")


def check_range(name: str, value: float, low: float, *, open_: bool = False) -> None:
    """Raise ValueError unless ``value`` is finite and at least ``low``, or above ``low`` with ``open_``."""
    if not (math.isfinite(value) and (value > low if open_ else value >= low)):
        raise ValueError(f"{name}: found {value}, expected a finite number {'>' if open_ else '>='} {low}")


def summed_over_processes(counts: Tensor) -> Tensor:
    """Sum counts over all processes of a group, with gradient.

    DDP averages gradients over processes. With this function, that average is the gradient of a loss of the sums.

    Args:
        counts: This process's counts, of the same shape and floating-point dtype on every process.

    Returns:
        The sums; without a process group, or if gradients are off, ``counts`` unchanged. An evaluation may run on one
        process only, where a collective would deadlock.
    """
    if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
        return cast(Tensor, _SumOverProcesses.apply(counts))
    return counts


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes in forward and backward; torch's own function is deprecated since 2.14."""

    @staticmethod
    def forward(ctx: Any, counts: Tensor) -> Tensor:
        total = counts.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        total = upstream.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def mean_over_processes(total: Tensor, number: Tensor) -> Tensor:
    """Divide a sum by its count; 0 if the count is 0.

    In training, the count is the mean over all processes of a group. DDP averages over processes; this makes the average
    equal the mean over the pixels of all processes, even if their counts differ.

    Args:
        total: Scalar, this process's sum.
        number: Scalar, this process's count: pixels, or the sum of their weights. It gets no gradient.

    Returns:
        A scalar in the dtype of ``total`` or float32, whichever is wider.
    """
    processes = 1
    number = number.detach().to(torch.promote_types(total.dtype, torch.float32))
    # an evaluation without gradients may run on one process only, where a collective would deadlock
    if total.requires_grad and torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        number = number.clone()
        torch.distributed.all_reduce(number)
    return total / (number.where(number > 0, 1.0) / processes)


class Objective(nn.Module):
    """Base class of the objectives: checks inputs, shows the settings in ``repr``, keeps buffers in float64.

    A subclass implements ``_loss(logits, target, labelled)``, or overrides ``forward`` to accept coarse logits as well.

    Args:
        ignore_index: Label of void pixels.

    Attributes:
        class_statistics: Named statistics per class of the last call, ``(C,)`` each, without gradient; NaN if the batch
            does not determine the value. `mcseg.callbacks.ObjectiveMonitor` logs them.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.class_statistics: dict[str, Tensor] = {}

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """Named constants per class that calibration sets, ``(C,)`` each; empty before calibration."""
        return {}

    def extra_repr(self) -> str:
        """List the settings."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: ``(N, C, *spatial)`` floating point, unbounded scores.
            target: ``(N, *spatial)`` integers, 0..C-1 or ``ignore_index``.

        Returns:
            Scalar >= 0 in float32, or in float64 for float64 logits; 0 if nothing is labelled.

        Raises:
            RuntimeError: The objective needs pixel counts and is not calibrated.
            TypeError: Logits are not floating point, or the target is not of an integer dtype.
            ValueError: Shapes or numbers of classes do not match, or (CPU only) a label is neither a class nor
                ``ignore_index``.
        """
        check_inputs(logits, target)
        target = target.long()  # convert before comparing: uint8 would wrap a negative ignore_index
        if logits.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU this would synchronise
            check_labels(target, logits.shape[1], self.ignore_index)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labelled = target != self.ignore_index
        # mask before any arithmetic: a NaN or infinite logit under void would reach the gradient as 0 * NaN
        return self._loss(logits.masked_fill(~labelled.unsqueeze(1), 0.0), target, labelled)

    def _loss(self, logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
        """Compute the loss of checked inputs.

        Args:
            logits: ``(N, C, *spatial)`` float32 or float64; 0 at void pixels.
            target: ``(N, *spatial)`` int64.
            labelled: ``(N, *spatial)`` bool, False at void pixels.
        """
        raise NotImplementedError

    def _reset_buffers(self) -> None:
        """Register the buffers with the values of a new module."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # .half() and .to(dtype) would round the buffers: hide them from `fn`, then only move them to its device
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        if not kept:
            return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]
        before = next(iter(kept.values())).device
        for name in kept:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            device = fn(torch.empty((), device=before)).device
        finally:
            self._buffers.update(kept)
        if before.type == "meta" and device.type != "meta":  # to_empty() after building on meta
            self._reset_buffers()
        for name in kept:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            self._buffers[name] = cast(Tensor, self._buffers[name]).to(dtype).to(device)
        return self


class CalibratedLoss(Objective):
    """Base class of objectives with constants per class that follow from the pixel counts of the training labels.

    Call `calibrate` once before the first use. The constants are float64 buffers ``(C,)``, NaN until then. The
    ``state_dict`` contains them, so an objective that loads a calibrated checkpoint needs no training labels. They stay
    float64 when the module is cast to another dtype.

    A subclass names its buffers in ``_stored``, computes them in ``_values`` and calls ``_require_calibrated``.

    Args:
        num_classes: C >= 2; may be None if ``counted`` is False.
        ignore_index: Label of void pixels.
        counted: Whether the settings need pixel counts; without them there are no buffers.
    """

    _stored: tuple[str, ...] = ()
    _absent = "its constant is 0"  # end of the warning about a class without pixels

    def __init__(self, num_classes: int | None, ignore_index: int = 255, *, counted: bool = True) -> None:
        super().__init__(ignore_index)
        if num_classes is None and counted:
            raise ValueError("num_classes: found None, expected the number of classes; these settings need pixel counts")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes: found {num_classes}, expected at least 2")
        self.num_classes = num_classes
        self._counted = counted
        self._reset_buffers()

    @property
    def is_calibrated(self) -> bool:
        """Whether the constants are set, or not needed."""
        return self._calibrated or not self._counted

    def calibrate(self, class_pixels: ClassPixels) -> Self:
        """Set the constants from the pixel counts of the training labels.

        Args:
            class_pixels: ``(C,)`` labelled pixels per class, void excluded; tensor, array or sequence.

        Returns:
            The module itself.

        Raises:
            ValueError: The counts are not ``num_classes`` finite numbers >= 0, or fewer than two classes have pixels.

        Warns:
            UserWarning: A class has no pixels; the warning names its index.
        """
        n = checked_counts(class_pixels)
        if len(n) != self.num_classes:
            raise ValueError(
                f"class_pixels: found {len(n)} counts, expected {self.num_classes}, one per class (num_classes)"
            )
        warn_about_absent_classes(n, self._absent)
        values = self._values(n)
        for name in self._stored:
            cast(Tensor, getattr(self, name)).copy_(values[name])
        self._calibrated = True
        self._derive()
        return self

    def extra_repr(self) -> str:
        """List the settings, and whether the objective is calibrated."""
        return super().extra_repr() + (f", calibrated={self._calibrated}" if self._counted else "")

    def _values(self, n: Tensor) -> dict[str, Tensor]:
        """Compute the buffers by name, finite, from the counts; all are float64 ``(C,)`` on the CPU."""
        raise NotImplementedError

    def _derive(self) -> None:
        """Recompute everything that depends on the stored buffers; called after each change of them."""

    def _require_calibrated(self) -> None:
        if not self.is_calibrated:
            raise RuntimeError(
                f"{type(self).__name__} is not calibrated: call loss.calibrate(class_pixels) with the pixel counts of "
                "the training labels, or load a calibrated state_dict (trainer.fit calibrates the module's objective)"
            )

    def _reset_buffers(self) -> None:
        # a flag, because searching the buffers for NaN in each step would synchronise the GPU
        self._calibrated = False
        if not self._counted:
            return
        for name in self._stored:
            self.register_buffer(name, torch.full((self.num_classes or 0,), torch.nan, dtype=torch.float64))
        self._derive()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self._counted:
            return
        stored = [cast(Tensor, getattr(self, name)) for name in self._stored]
        self._calibrated = not any(values.is_meta or bool(values.isnan().any()) for values in stored)
        self._derive()


class CountedLoss(CalibratedLoss):
    """Base class of objectives with one constant per class; it stores the counts and derives the constant from them.

    A subclass computes the constants in ``_terms`` and reads them with ``_terms_for``.

    Args:
        num_classes: C >= 2; may be None if ``counted`` is False.
        ignore_index: Label of void pixels.
        counted: Whether the settings need pixel counts; without them there are no buffers.

    Attributes:
        class_pixels: Buffer, float64 ``(C,)``, NaN until calibrated.
        class_terms: Constants derived from the counts, float64 ``(C,)``; a buffer that is not in the ``state_dict``.
    """

    class_pixels: Tensor
    class_terms: Tensor
    _stored = ("class_pixels",)
    _term = "constant"  # name of the entry in `class_constants`

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """The constant per class, ``(C,)``, by its name; empty before calibration."""
        return {self._term: self.class_terms} if self._calibrated else {}

    def _values(self, n: Tensor) -> dict[str, Tensor]:
        self._terms(n)  # raise for invalid counts before storing anything
        return {"class_pixels": n}

    def _derive(self) -> None:
        n = self.class_pixels
        terms = self._terms(n.detach().cpu().double()).to(n.dtype).to(n.device) if self._calibrated else n.clone()
        self.register_buffer("class_terms", terms, persistent=False)

    def _terms(self, n: Tensor) -> Tensor:
        """Derive finite constants from the counts; both are float64 ``(C,)`` on the CPU."""
        raise NotImplementedError

    def _terms_for(self, logits: Tensor) -> Tensor:
        """Return the constants in the dtype and on the device of the logits."""
        self._require_calibrated()
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits: found {logits.shape[1]} classes, expected {self.num_classes}; use the same number of classes in "
                "the network and in the loss"
            )
        return self.class_terms.to(logits.dtype).to(logits.device)  # convert the dtype first: MPS has no float64
