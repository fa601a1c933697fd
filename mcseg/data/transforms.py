"""Training and evaluation transforms on image and mask together (torchvision v2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from mcseg.data.files import Window
from mcseg.data.labels import IGNORE_INDEX

_TRIES = 10  # windows looked at before the last one is taken whatever it holds
_PROBE = 32  # a grid of about 32x32 pixels tells a window's class shares well enough
_GRID = 4  # every fourth row and column tell which classes a mask holds, in a sixteenth of the time
_GREY = torch.tensor([0.2989, 0.587, 0.114]) / 0.9999  # luma weights of ITU-R BT.601, scaled to the sum 1


class TrainingTransform(v2.Transform):  # type: ignore[misc]
    """Scale jitter, crop, horizontal flip and colour jitter in one transform of ``tv_tensors`` Image and Mask.

    A window of ``crop_size / scale`` pixels is cut and resized to ``crop_size``: what resizing the whole image and cropping
    would give, at the cost of the crop. Where the window is larger than the image the rest is padded: black in the image,
    void in the mask. One transform and not a chain of torchvision's, because the chain costs as much as decoding the files.

    Colour: brightness b, contrast c and saturation s, as torchvision's ``ColorJitter`` applies them in this order, are one
    affine map of a pixel x when nothing is clipped in between. With g the luma weights and m the mean luma of the image,
    brightness gives b x, contrast c b x + (1 - c) b m, and saturation mixes each result with its luma: together
    b c (s I + (1 - s) 1 g^T) x + (1 - c) b m.

    Args:
        crop_size: (height, width) of the result in pixels.
        scale_range: the scale is drawn uniformly from here; 1 keeps the file's resolution, 0.5 shrinks to half.
        max_class_share: a window in which one class has more than this share of the labelled pixels, or in which nothing is
            labelled, is drawn again (up to 10 times). 1 switches the cap off.
        flip: flip horizontally with probability 1/2.
        color_jitter: b, c and s are drawn uniformly from [1 - color_jitter, 1 + color_jitter].
        max_side: a longer side of more pixels counts as shrunk to this before the scale is applied.
        rare_crop_share: probability with which a window is not drawn anywhere but centred on a pixel of a class that is
            drawn with ``class_weights`` among those in the mask; pixels are looked for on a grid of every fourth row and
            column.
        class_weights: (C,) for ``rare_crop_share``.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        scale_range: tuple[float, float] = (1.0, 1.0),
        max_class_share: float = 1.0,
        flip: bool = False,
        color_jitter: float = 0.0,
        max_side: int | None = None,
        rare_crop_share: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.max_class_share = max_class_share
        self.flip = flip
        self.color_jitter = color_jitter
        self.max_side = max_side
        self.rare_crop_share = rare_crop_share
        self.class_weights = class_weights

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw for a pair; see :meth:`draw`."""
        return self.draw(next(value for value in flat_inputs if isinstance(value, tv_tensors.Mask)).as_subclass(Tensor))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Transform one of the two: (3,H,W) uint8 image or (H,W) uint8 mask."""
        pixels = inpt.as_subclass(Tensor)  # each operation on a tv_tensor itself costs as much as a small resize
        cut = params["window"].cut(pixels)
        return tv_tensors.wrap(
            self.finish_mask(cut, params) if pixels.ndim == 2 else self.finish_image(cut, params), like=inpt
        )

    def draw(self, mask: Tensor) -> dict[str, Any]:
        """Draw window, flip and colour factors for a mask (H,W); all randomness comes from torch's generator.

        Returns:
            ``window``: the part of image and mask to cut; and what :meth:`finish_image`, :meth:`finish_mask` need to go on.
        """
        (scale, flip, *places), factors = torch.rand(2 + 2 * _TRIES).tolist(), 2 * torch.rand(3) - 1
        low, high = self.scale_range
        total = (low + (high - low) * scale) * shrinking(mask.shape, self.max_side)
        height, width = (max(1, round(side / total)) for side in self.crop_size)
        top = left = 0
        for place in zip(places[::2], places[1::2], strict=True):
            top, left = _offset(mask.shape[0], height, place[0]), _offset(mask.shape[1], width, place[1])
            if self.max_class_share >= 1 or self._acceptable(mask, top, left, height, width):
                break
        if self.rare_crop_share and float(torch.rand(())) < self.rare_crop_share:
            top, left = self._around_a_rare_class(mask, height, width) or (top, left)
        full_height, full_width = mask.shape
        window = Window(max(top, 0), max(left, 0), min(top + height, full_height), min(left + width, full_width))
        return {
            "window": window,
            # left, right, top, bottom: what of the drawn window lies beyond the borders
            "padding": (window.left - left, left + width - window.right, window.top - top, top + height - window.bottom),
            "flip": self.flip and flip < 0.5,
            "factors": 1 + self.color_jitter * factors if self.color_jitter else None,
        }

    def finish_image(self, cut: Tensor, params: dict[str, Any]) -> Tensor:
        """Resize, pad, flip and colour the cut part (3,h,w) of an image."""
        size, padding = self._inside(params)
        changed = F.pad(F.interpolate(cut[None], size, mode="bilinear", antialias=True)[0], padding)
        if params["flip"]:
            changed = changed.flip(-1)
        return changed if params["factors"] is None else _scale_color(changed, *params["factors"])

    def finish_mask(self, cut: Tensor, params: dict[str, Any]) -> Tensor:
        """Resize, pad and flip the cut part (h,w) of a mask."""
        size, padding = self._inside(params)
        changed = F.pad(F.interpolate(cut[None, None], size, mode="nearest")[0, 0], padding, value=IGNORE_INDEX)
        return changed.flip(-1) if params["flip"] else changed

    def _inside(self, params: dict[str, Any]) -> tuple[list[int], list[int]]:
        """(height, width) of the cut part in the result, and the padding (left, right, top, bottom) around it."""
        window, (left, right, top, bottom) = params["window"], params["padding"]
        size: list[int] = []
        padding: list[int] = []
        for new, part, before, after in (
            (self.crop_size[0], window.bottom - window.top, top, bottom),
            (self.crop_size[1], window.right - window.left, left, right),
        ):
            full = before + part + after
            start = min(round(before * new / full), new - 1)
            length = max(1, min(round(part * new / full), new - start))
            size.append(length)
            padding = [start, new - start - length, *padding]
        return size, padding

    def _around_a_rare_class(self, mask: Tensor, height: int, width: int) -> tuple[int, int] | None:
        """Top and left of a window centred on a pixel of a class drawn by its weight; None where nothing is labelled."""
        assert self.class_weights is not None
        grid = mask[::_GRID, ::_GRID]
        present = torch.bincount(grid.flatten(), minlength=len(self.class_weights))[: len(self.class_weights)] > 0
        weights = self.class_weights * present
        if not weights.any():
            return None
        places = (grid == int(torch.multinomial(weights, 1))).nonzero()
        row, column = (_GRID * places[int(torch.randint(len(places), ()))]).tolist()
        return _inside(mask.shape[0], height, row - height // 2), _inside(mask.shape[1], width, column - width // 2)

    def _acceptable(self, mask: Tensor, top: int, left: int, height: int, width: int) -> bool:
        step = max(1, min(height, width) // _PROBE)
        probe = mask[max(top, 0) : top + height : step, max(left, 0) : left + width : step]
        counts = torch.bincount(probe.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        labelled = int(counts.sum())
        return labelled > 0 and int(counts.max()) <= self.max_class_share * labelled


def _offset(full: int, part: int, place: float) -> int:
    """Where a window of ``part`` pixels starts: anywhere inside, or so that the smaller image lies anywhere in it."""
    low, high = min(0, full - part), max(0, full - part)
    return low + int(place * (high - low + 1))


def _inside(full: int, part: int, start: int) -> int:
    """Nearest start at which a window of ``part`` pixels lies inside, or holds all of a smaller image."""
    return max(min(0, full - part), min(max(0, full - part), start))


def _scale_color(image: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Affine colour map of :class:`TrainingTransform` on (3,H,W) uint8."""
    pixels = image.flatten(1).float()  # (3, H*W)
    matrix = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * _GREY.expand(3, 3))
    offset = (1 - contrast) * brightness * (_GREY @ pixels.mean(1))
    changed = torch.addmm(offset.expand(1) + 0.5, matrix, pixels)  # + 0.5: the conversion cuts off
    return changed.clamp_(0, 255).to(torch.uint8).view(image.shape)


def shrinking(size: tuple[int, ...], max_side: int | None) -> float:
    """Factor that brings the longer side of (height, width) down to ``max_side``; 1 where it is not longer."""
    return 1.0 if max_side is None else min(1.0, max_side / max(size))


def resize_image(image: Tensor, image_scale: float) -> Tensor:
    """Resize an (3,H,W) uint8 image for evaluation by ``image_scale``; masks keep the size at which they are scored."""
    if image_scale == 1:
        return image
    size = [max(1, round(side * image_scale)) for side in image.shape[-2:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
