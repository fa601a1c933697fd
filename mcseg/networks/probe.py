"""Passes of a new network over small images: which sizes it accepts, and which of its parts the output does not use."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from mcseg.messages import one_line

Run = Callable[[int, int], list[Tensor]]  # height and width of an image that they determine -> outputs of the network


class Sizes(NamedTuple):
    """Heights and widths that a network accepts, in pixels.

    Attributes:
        step: height and width are multiples of these two numbers.
        minimum: smallest height and width.
        fixed: whether ``step`` is the only accepted size.
    """

    step: tuple[int, int]
    minimum: tuple[int, int]
    fixed: bool = False

    def padded(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Return the smallest accepted height and width that hold an image.

        Args:
            height: rows; a number, a symbol of ``torch.export``, or a tensor of ``torch.jit.trace``.
            width: columns, likewise.

        Raises:
            ValueError: The image is larger than the only accepted size.
        """
        if self.fixed and (height > self.step[0] or width > self.step[1]):
            accepted = "x".join(map(str, self.step))
            raise ValueError(
                f"found an image of {int(height)}x{int(width)} pixels, but the encoder takes at most {accepted}; set "
                f"data.crop_size and inference.window to [{self.step[0]},{self.step[1]}], or choose another encoder"
            )
        return tuple(
            _at_least((size + step - 1) // step * step, minimum, step)
            for size, step, minimum in zip((height, width), self.step, self.minimum, strict=True)
        )


def _at_least(size: Any, minimum: int, step: int) -> Any:
    if minimum <= step:
        return size
    return size.clamp(min=minimum) if isinstance(size, Tensor) else torch.sym_max(size, minimum)


def accepted_sizes(run: Run, stride: int) -> Sizes | None:
    """Find the multiples of its output stride, in pixels, that a network accepts; None if it takes at most one size."""
    for factor in (1, 2, 4, 8):  # pyramids of poolings need more than one pixel, windows and parallel scales larger steps
        size = factor * stride
        if _failure(run, size, size):
            continue
        if factor == 1 or not _failure(run, size + stride, size + 2 * stride):
            return Sizes((stride, stride), (size, size))
        if not _failure(run, 2 * size, size):
            return Sizes((size, size), (size, size))
    return None


def native_sizes(model: nn.Module, run: Run) -> Sizes:
    """Find the sizes that a network accepts, if it does not take any multiple of its output stride.

    Args:
        model: an SMP model.
        run: computes the model's outputs for an image of given height and width.

    Raises:
        ValueError: The model does not even take the size for which its encoder was built; the message is the reason.
    """
    size = _native_size(model)
    if reason := _failure(run, *size):
        raise ValueError(reason)
    return Sizes(size, size, fixed=bool(_failure(run, 2 * size[0], size[1])))


def _failure(run: Run, height: int, width: int) -> str:
    """Return why a network does not take an image size; empty if it does."""
    try:
        with torch.no_grad():
            run(height, width)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return one_line(error, limit=200) or type(error).__name__
    return ""


def _native_size(model: nn.Module) -> tuple[int, int]:
    """Return the image size for which a timm encoder was built."""
    for module in model.modules():
        size = getattr(getattr(module, "patch_embed", module), "img_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    for module in model.modules():
        size = (getattr(module, "pretrained_cfg", None) or {}).get("input_size")
        if size is not None:
            return int(size[-2]), int(size[-1])
    return 224, 224


class Unused(nn.Module):
    """Take the place of a part that was removed; it passes its first argument on."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument."""
        return x


def remove_unused(model: nn.Module, run: Run, size: tuple[int, int]) -> dict[str, bool]:
    """Remove the parts of a model whose parameters have no gradient of its outputs, so that each parameter is trained.

    Parts whose removal would change the outputs stay, with parameters that are not trained. Initial weights do not depend on
    what is removed, as the whole model was built first.

    Args:
        model: in evaluation mode; modified.
        run: computes the model's outputs for an image of given height and width.
        size: a height and width that the model accepts.

    Returns:
        Name of each tensor removed from the ``state_dict`` -> whether it is a parameter.
    """
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in model.modules()]
    try:
        outputs = run(*size)
    finally:
        for hook in hooks:
            hook.remove()
    unused = _without_gradient(model, outputs)
    if not unused:
        return {}
    tensors = {name: isinstance(value, nn.Parameter) for name, value in model.state_dict(keep_vars=True).items()}
    parts = list(_parts(model, unused))
    idle = [part for part in parts if not any(module in called for module in getattr(*part).modules())]
    for chosen in (parts, idle):
        # parts that are computed but not used are removed as well if the outputs stay the same
        originals = [getattr(parent, name) for parent, name in chosen]
        for parent, name in chosen:
            setattr(parent, name, Unused())
        if _computes(outputs, run, size):
            break
        for (parent, name), original in zip(chosen, originals, strict=True):
            setattr(parent, name, original)
    for parameter in model.parameters():
        if parameter in unused:
            parameter.requires_grad_(False)
    left = model.state_dict()
    return {name: is_parameter for name, is_parameter in tensors.items() if name not in left}


def _without_gradient(model: nn.Module, outputs: list[Tensor]) -> set[nn.Parameter]:
    """Return the parameters that are not in the graph of the outputs."""
    nodes = {output.grad_fn for output in outputs if output.grad_fn is not None}
    waiting = list(nodes)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting.append(node)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {parameter for parameter in trained if get_gradient_edge(parameter).node not in nodes}


def _parts(module: nn.Module, unused: set[nn.Parameter]) -> Iterator[tuple[nn.Module, str]]:
    """Find the largest submodules without other parameters: the module to which each belongs, and its name there."""
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and all(parameter in unused for parameter in parameters):
            yield module, name
        elif parameters:
            yield from _parts(child, unused)


def _computes(outputs: list[Tensor], run: Run, size: tuple[int, int]) -> bool:
    """Return whether a run gives these outputs, bit by bit; with gradients, as kernels of attention differ without."""
    try:
        return all(torch.equal(one, other) for one, other in zip(outputs, run(*size), strict=True))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False


def second_to_last(outputs: Sequence[Any]) -> Tensor:
    """Return the second-to-last feature map of an encoder's outputs."""
    maps = outputs[0] if isinstance(outputs, tuple) else outputs  # those for DPT come with prefix tokens
    return cast(Tensor, maps[-2])


def probe(model: Any, height: int, width: int, *, with_aux: bool = False, bands: int = 3) -> list[Tensor]:
    """Compute the logits of an image of a given size, and with ``with_aux`` the feature map of an auxiliary head."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, bands, height, width, generator=generator, device="cpu").to(next(model.parameters()))
    if not with_aux:
        return [model(image)]
    features: list[Tensor] = []
    # SMP models pass the features to their decoder internally; a hook reads them without a second pass
    hook = model.encoder.register_forward_hook(lambda encoder, args, outputs: features.append(second_to_last(outputs)))
    try:
        logits = model(image)
    finally:
        hook.remove()
    return [logits, *features]
