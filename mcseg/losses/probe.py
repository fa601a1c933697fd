"""Build an objective, and try it on a small batch before training: losses of other libraries may not know void pixels."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from mcseg.losses.base import Objective, offered
from mcseg.losses.regions import default_objective

_VOID = 255
_SIDES = (32, 256)  # of the images; some losses need a minimum size
_TOLERANCE = 1e-4  # relative change of the loss that rounding may explain


def build_objective(objective: nn.Module | Callable[[], nn.Module] | None) -> nn.Module:
    """Return an objective, or build it; None builds the default.

    Raises:
        ValueError: The callable needs arguments, or builds no module.
    """
    if isinstance(objective, nn.Module):
        return objective
    build = objective or default_objective
    expected = "expected a torch.nn.Module, or a class or functools.partial that builds one without further arguments"
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise ValueError(f"objective: {_name(build)} cannot be called without arguments ({error}); {expected}") from None
    except ValueError:  # a callable without a signature
        pass
    built = build()
    if not isinstance(built, nn.Module):
        raise ValueError(f"objective: {_name(build)} returns {type(built).__name__}; {expected}")
    return built


def check_objective(objective: nn.Module, num_classes: int, device: torch.device) -> None:
    """Call copies of an objective on random logits, and check that the loss is one to train with.

    Labels of all classes are tried on ``device``, with gradient. Void labels are tried on the CPU, because a label that a
    loss does not expect can make a GPU unusable. The objective and the random number generators of torch are not changed.

    Args:
        objective: Calibrated objective. One that cannot be copied is not checked; one that only works on ``device`` is not
            tried with void labels.
        num_classes: Number of classes C.
        device: Device of the objective.

    Raises:
        ValueError: The objective fails for logits ``(N, C, H, W)`` and target ``(N, H, W)``, its loss is not a scalar or has
            no gradient, or it does not leave out pixels with the label 255.

    Warns:
        UserWarning: The loss depends on the logits of void pixels, and no part of the objective has an ``ignore_index``.
    """
    try:
        copy.deepcopy(objective)
    except Exception:  # any error of a class that does not support copies
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        logits, target = _labelled_batch(objective, num_classes, device)
        with torch.no_grad():
            _check_void(objective, logits, target)


def _labelled_batch(objective: nn.Module, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the smallest batch for which the objective gives a scalar with a gradient, on the CPU; or raise ValueError."""
    failure: tuple[Exception, Tensor, Tensor] | None = None
    for side in _SIDES:
        images = 3 if num_classes == 2 else 2  # not C: losses that compare shapes must not take classes for images
        logits = torch.randn(images, num_classes, side, side, generator=torch.Generator().manual_seed(0))
        target = (torch.arange(images * side * side) % num_classes).view(images, side, side)
        try:
            loss = _call(objective, logits.to(device).requires_grad_(), target.to(device))[0]
        except Exception as error:  # whatever the objective raises
            failure = failure or (error, logits, target)
            continue
        _check_scalar(objective, loss)
        return logits, target
    assert failure is not None
    reason, logits, target = failure
    if isinstance(objective, Objective) and isinstance(reason, ValueError):  # says in one line what is wrong
        raise ValueError(f"objective: {_name(objective)}: {reason}") from reason
    raise ValueError(
        f"objective: {_name(objective)} fails for logits {_shape(logits)} and a target {_shape(target)} of class indices "
        f"({_text(reason)}); expected a loss of logits (N, C, H, W) and target (N, H, W) int64"
    ) from reason


def _check_scalar(objective: nn.Module, loss: Any) -> None:
    name = f"objective: {_name(objective)}"
    if not isinstance(loss, Tensor):
        raise ValueError(f"{name} returns {type(loss).__name__}, expected a scalar tensor")
    if loss.ndim:
        advice = "; set its reduction to 'mean'" if hasattr(objective, "reduction") else "; average it over the pixels"
        raise ValueError(f"{name} returns a tensor of shape {_shape(loss)}, expected a scalar{advice}")
    if not loss.requires_grad:
        raise ValueError(
            f"{name} returns a value without gradient, expected a differentiable loss; scores of predicted classes, "
            "detach() and torch.no_grad() have no gradient"
        )


def _check_void(objective: nn.Module, logits: Tensor, target: Tensor) -> None:
    """Raise ValueError, or warn, if an objective fails for void pixels or depends on their logits."""
    cpu = torch.device("cpu")
    try:
        labelled = _call(objective, logits, target, cpu)
    except Exception:  # for example a loss with tensors on a GPU
        return
    rows = logits.shape[2] // 4
    void = target.clone()
    void[:, :rows] = _VOID
    changed = logits.clone()
    changed[:, :, :rows] = -8 * logits[:, :, :rows].flip(1)
    try:
        before, after = _call(objective, logits, void, cpu), _call(objective, changed, void, cpu)
    except Exception as error:
        raise _void_error(objective, _text(error)) from error
    for term, value in before[1].items():
        if not torch.as_tensor(labelled[1][term]).isfinite().all():  # not the fault of void pixels
            continue
        if not (torch.as_tensor(value).isfinite().all() and torch.as_tensor(after[1][term]).isfinite().all()):
            raise _void_error(objective, f"its {term} is {value}")
        if not torch.allclose(torch.as_tensor(value), torch.as_tensor(after[1][term]), rtol=_TOLERANCE, atol=1e-6):
            dependence = _void_error(objective, f"its {term} depends on their logits")
            if _ignore_indices(objective):
                raise dependence
            rank_zero_warn(f"{dependence}, unless this is intended")


def _call(
    objective: nn.Module, logits: Tensor, target: Tensor, device: torch.device | None = None
) -> tuple[Any, dict[str, Any]]:
    """Call a copy, on ``device`` if given.

    Returns:
        The loss, and the loss and its terms by name.
    """
    torch.default_generator.manual_seed(0)
    copied = copy.deepcopy(objective)
    if device is not None:
        copied = copied.to(device)
    loss = copied(logits, target)
    return loss, {"value": loss, **offered(copied, "terms")}


def _void_error(objective: nn.Module, symptom: str) -> ValueError:
    found = _ignore_indices(objective)
    advice = f"leave out the pixels where target == {_VOID} in its forward, or choose a loss of mcseg.losses"
    if found:
        shown = " and ".join(f"{type(part).__name__} has ignore_index {part.ignore_index}" for part in found)
        takes = all("ignore_index" in inspect.signature(type(part)).parameters for part in found)
        advice = f"{shown}; " + (f"set ignore_index to {_VOID}" if takes else f"it cannot be set; {advice}")
    return ValueError(f"objective: {_name(objective)} does not leave out void pixels (label {_VOID}): {symptom}; {advice}")


def _ignore_indices(objective: nn.Module) -> list[Any]:
    """Return the parts of the objective, itself included, that have an ``ignore_index`` other than 255."""
    return [part for part in objective.modules() if getattr(part, "ignore_index", _VOID) != _VOID]


def _name(objective: Any) -> str:
    return getattr(objective, "__qualname__", None) or type(objective).__qualname__


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _text(error: Exception) -> str:
    """Return type and message of an error as one line of limited length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".rstrip(".: ")
