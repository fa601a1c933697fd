"""What an objective offers, and what those of mcseg share: checked inputs, constants that stay float64, calibration."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, cast, get_args

import torch
import torch.distributed
from torch import Tensor, nn

from mcseg.kernels import Upsampling, check_labels
from mcseg.margins import ClassPixels, checked_counts


class ObjectiveProtocol(Protocol):
    """What an objective offers to the module, to sums of objectives and to the callbacks.

    Any ``torch.nn.Module`` that is called with logits and target serves; all else is optional, and `offered` gives what
    holds where an objective does not have it.

    Attributes:
        is_calibrated: Whether it can be called; False until `calibrate` where it needs pixel counts. Default: True.
        terms: Parts of the last value by name, scalars without gradient, which are logged. Default: none.
        class_constants: What calibration set for each class, ``(C,)`` each by name. Default: none.
        class_statistics: What the last call found of each class, ``(C,)`` each by name. Default: none.
        takes_coarse_logits: Whether it may be called with an `mcseg.kernels.Upsampling` as third argument and logits
            ``(N, C, h, w)`` that are to be upsampled so to the target's size. Default: False.
    """

    is_calibrated: bool
    terms: Mapping[str, Tensor]
    class_constants: Mapping[str, Tensor]
    class_statistics: Mapping[str, Tensor]
    takes_coarse_logits: bool

    def __call__(self, logits: Tensor, target: Tensor, /) -> Tensor:
        """Compute a scalar from ``logits (N, C, H, W)`` and ``target (N, H, W)``: classes, or 255 where void."""
        ...

    def calibrate(self, class_pixels: ClassPixels, /) -> Any:
        """Take ``(C,)`` counts of the pixels of the training labels. Default: None in its place, nothing is counted."""
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
    """An optional member of `ObjectiveProtocol` by its name, or the default where the objective does not have it."""
    return getattr(objective, name, _DEFAULTS[name])


def check_inputs(logits: Tensor, target: Tensor, least_classes: int = 1, upsampling: Upsampling | None = None) -> None:
    """Raise TypeError or ValueError where logits (N,C,*spatial) and target (N,*spatial) do not go together."""
    if not logits.is_floating_point():
        raise TypeError(f"logits: found dtype {logits.dtype}, expected floating point: the network's raw output")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target: found dtype {target.dtype}, expected an integer dtype; convert labels with .long()")
    if logits.ndim < 2 or logits.shape[1] < least_classes:
        least = f" with C >= {least_classes} classes" if least_classes > 1 else ""
        raise ValueError(f"logits: found shape {tuple(logits.shape)}, expected (N, C, *spatial){least}")
    if upsampling is not None:
        if logits.ndim != 4 or target.ndim != 3 or len(target) != len(logits):
            raise ValueError(
                f"upsampling: found logits {tuple(logits.shape)} and target {tuple(target.shape)}, expected (N, C, h, w) "
                "and (N, H, W)"
            )
        if target.shape[1] > upsampling.height or target.shape[2] > upsampling.width:
            raise ValueError(
                f"upsampling: found a target of {tuple(target.shape[1:])} for logits upsampled to {upsampling[:2]}, "
                "expected no larger one"
            )
        return
    expected = (logits.shape[0], *logits.shape[2:])
    if target.shape != expected:
        raise ValueError(
            f"target: found shape {tuple(target.shape)}, expected {expected} for logits {tuple(logits.shape)}: "
            "class indices without a class dimension, logits resized to the labels"
        )


def as_upsampling(upsample: bool | Upsampling, target: Tensor) -> Upsampling | None:
    """Spell out what True (to the size of the target) and False (not at all) say."""
    return Upsampling(*target.shape[-2:]) if upsample is True else upsample or None


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ValueError where a setting is none of the values of its Literal type."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(map(repr, get_args(choices)))}")


def check_range(name: str, value: float, low: float, *, open_: bool = False) -> None:
    """Raise ValueError where a setting is not finite and at least ``low``, or with ``open_`` above it."""
    if not (math.isfinite(value) and (value > low if open_ else value >= low)):
        raise ValueError(f"{name}: found {value}, expected a finite number {'>' if open_ else '>='} {low}")


def summed_over_processes(counts: Tensor) -> Tensor:
    """Sum counts over all processes of a group, with gradient.

    Outside a group, and where no gradient is recorded (an evaluation is a process's own affair, and the others would be
    waited for in vain), they are returned as they are.

    A process answers for its share of the sums of all, so the mean over processes that DDP takes of the gradients is the
    gradient of a loss that is a function of the sums.
    """
    if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
        return cast(Tensor, _SumOverProcesses.apply(counts))
    return counts


class _SumOverProcesses(torch.autograd.Function):
    """A sum over processes, whose derivative is one as well; torch deprecates its own from 2.14 on."""

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
    """Divide a sum by what it is a sum of, 0 by nothing; in training the number is that of all processes of a group.

    The mean over processes that DDP takes of the gradients is then that of the mean over all their pixels, also where one
    process has more labelled ones than another, or none; and so is the mean of the losses.

    Args:
        total: scalar, this process's sum.
        number: scalar, pixels or the sum of their weights, no gradient is wanted of it.
    """
    processes = 1
    number = number.detach().to(torch.promote_types(total.dtype, torch.float32))
    # a loss that has no gradient may be one process's own affair, and the others would be waited for in vain
    if total.requires_grad and torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        number = number.clone()
        torch.distributed.all_reduce(number)
    return total / (number.where(number > 0, 1.0) / processes)


class Objective(nn.Module):
    """What the objectives share: checked inputs, settings in their representation, constants that stay float64.

    Args:
        ignore_index: Label of void pixels.

    Attributes:
        class_statistics: What the last call found of each class, ``(C,)`` each by name, without gradient; NaN where the
            batch does not say. Over all processes, where the objective is. `mcseg.callbacks.ObjectiveMonitor` logs them.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.class_statistics: dict[str, Tensor] = {}

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """What calibration set for each class, ``(C,)`` each by name; none before it, and where none is needed."""
        return {}

    def extra_repr(self) -> str:
        """Name the settings."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: (N,C,*spatial) floating point, unbounded scores.
            target: (N,*spatial) integers, 0..C-1 or ``ignore_index``.

        Returns:
            Scalar >= 0 in float32, or float64 for logits of that type; 0 where nothing is labelled.

        Raises:
            RuntimeError: The loss derives constants from pixel counts and is not calibrated.
            TypeError: Logits are not floating point or labels not integers.
            ValueError: Shapes or numbers of classes do not go together, or (CPU only) a label is no class.
        """
        check_inputs(logits, target)
        target = target.long()  # before the comparison: uint8 would wrap a negative ignore_index
        if logits.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the host would wait
            check_labels(target, logits.shape[1], self.ignore_index)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labelled = target != self.ignore_index
        # before any arithmetic: a NaN or infinite logit under void would reach the gradient as 0 * NaN
        return self._loss(logits.masked_fill(~labelled.unsqueeze(1), 0.0), target, labelled)

    def _loss(self, logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
        """Compute the loss of checked inputs: logits in float32 or wider, target in int64, True where labelled."""
        raise NotImplementedError

    def _reset_buffers(self) -> None:
        """Register the buffers with the values that they have in a new module."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # .half() and .to(dtype) would round the constants: hide them from `fn`, then follow it to its device only
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
        if before.type == "meta" and device.type != "meta":  # to_empty() of a module that was built without storage
            self._reset_buffers()
        for name in kept:
            # mps has no float64
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._buffers[name] = cast(Tensor, self._buffers[name]).to(dtype).to(device)
        return self


class CalibratedLoss(Objective):
    """An objective with constants per class that follow from the pixel counts of the training labels.

    Call `calibrate` once before the first use. What `_stored` names are buffers, float64 ``(C,)``: NaN until calibrated,
    they travel in the ``state_dict``, so that an objective that loads a calibrated checkpoint needs no training labels.
    They stay float64 when the module is cast.

    Args:
        num_classes: C >= 2; None only where no counts are needed.
        ignore_index: Label of void pixels.
        counted: False where a setting needs no counts: there are no buffers then.
    """

    _stored: tuple[str, ...] = ()
    _absent = "its constant is 0"  # what becomes of a class without pixels, in the words of the warning

    def __init__(self, num_classes: int | None, ignore_index: int = 255, *, counted: bool = True) -> None:
        super().__init__(ignore_index)
        if num_classes is None and counted:
            raise ValueError("num_classes: found None, expected the number of classes, as counts of pixels are needed")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes: found {num_classes}, expected at least 2")
        self.num_classes = num_classes
        self._counted = counted
        self._reset_buffers()

    @property
    def is_calibrated(self) -> bool:
        """Whether the constants are known, or not needed."""
        return self._calibrated or not self._counted

    def calibrate(self, class_pixels: ClassPixels) -> Self:
        """Set the constants from ``(C,)`` counts of labelled training pixels per class, void excluded.

        Returns:
            The module itself.

        Raises:
            ValueError: The counts are not ``num_classes`` finite counts >= 0, with pixels in at least two classes.

        Warns:
            UserWarning: Some class has no pixels; it is named by its index.
        """
        n = checked_counts(class_pixels)
        if len(n) != self.num_classes:
            raise ValueError(
                f"class_pixels: found {len(n)} counts, expected {self.num_classes}: one for each of num_classes"
            )
        if absent := torch.nonzero(n == 0).flatten().tolist():
            warnings.warn(
                f"class_pixels: no pixels of class {', '.join(map(str, absent))}; {self._absent}. Check the label mapping "
                "if the training labels should contain it.",
                stacklevel=2,
            )
        with warnings.catch_warnings():  # it has just been said
            warnings.filterwarnings("ignore", message="class_pixels: no pixels of class")
            values = self._values(n)
        for name in self._stored:
            cast(Tensor, getattr(self, name)).copy_(values[name])
        self._calibrated = True
        self._derive()
        return self

    def extra_repr(self) -> str:
        """Name the settings and whether the constants are known."""
        return super().extra_repr() + (f", calibrated={self._calibrated}" if self._counted else "")

    def _values(self, n: Tensor) -> dict[str, Tensor]:
        """What is stored, finite float64 ``(C,)`` each by name, from the counts, likewise on the CPU."""
        raise NotImplementedError

    def _derive(self) -> None:
        """Compute what follows from the stored buffers; after each change of these."""

    def _require_calibrated(self) -> None:
        if not self.is_calibrated:
            raise RuntimeError(
                f"{type(self).__name__} is not calibrated: call loss.calibrate(class_pixels) with the pixel counts of "
                "the training labels, or load a calibrated state_dict (inside a Trainer, the data module calibrates it)"
            )

    def _reset_buffers(self) -> None:
        # a flag beside the buffers: looking for NaN in them at each step would make the host wait for the device
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
    """An objective with one constant per class, computed anew from the counts, which are what is stored.

    Args:
        num_classes: As of `CalibratedLoss`, likewise the others.
        ignore_index: See there.
        counted: See there.

    Attributes:
        class_pixels: Buffer, float64 ``(C,)``, NaN until calibrated.
        class_terms: Buffer outside the ``state_dict``, float64 ``(C,)``: what the objective derives from the counts.
    """

    class_pixels: Tensor
    class_terms: Tensor
    _stored = ("class_pixels",)
    _term = "constant"  # what `class_terms` are

    @property
    def class_constants(self) -> dict[str, Tensor]:
        """``class_terms``, once they are known, by what they are."""
        return {self._term: self.class_terms} if self._calibrated else {}

    def _values(self, n: Tensor) -> dict[str, Tensor]:
        self._terms(n)  # which may refuse them, before anything is stored
        return {"class_pixels": n}

    def _derive(self) -> None:
        n = self.class_pixels
        terms = self._terms(n.detach().cpu().double()).to(n.dtype).to(n.device) if self._calibrated else n.clone()
        self.register_buffer("class_terms", terms, persistent=False)

    def _terms(self, n: Tensor) -> Tensor:
        """Derive finite constants, float64 ``(C,)``, from the counts, likewise on the CPU."""
        raise NotImplementedError

    def _terms_for(self, logits: Tensor) -> Tensor:
        """Constants in dtype and on the device of the logits."""
        self._require_calibrated()
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits: found {logits.shape[1]} classes, expected {self.num_classes}; give the network and the loss the "
                "same number of classes"
            )
        return self.class_terms.to(logits.dtype).to(logits.device)  # dtype first: some devices have no float64
