"""Transforms of image and mask for training (torchvision v2), and resizing of images for evaluation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from mcseg.data.labels import IGNORE_INDEX
from mcseg.data.sources import Window

_TRIES = 10  # number of windows drawn at most for max_class_share; the last one is accepted in any case
_PROBE = 32  # class shares of a window are estimated on a grid of about 32x32 pixels
_GRID = 4  # the classes of a mask are looked up in every fourth row and column, in a sixteenth of the time
_GREY = torch.tensor([0.2989, 0.587, 0.114]) / 0.9999  # luma weights of ITU-R BT.601, scaled to the sum 1


class TrainingTransform(v2.Transform):  # type: ignore[misc]
    """Scale jitter, crop, horizontal flip and colour jitter in one transform of ``tv_tensors`` Image and Mask.

    A window of ``crop_size / scale`` pixels is cut and resized to ``crop_size``. The result equals resizing the whole image
    and cropping, but costs only the crop. If the window is larger than the image, the rest is padded: black in the image,
    void in the mask. A chain of torchvision's transforms would cost as much as decoding the files.

    Colour: torchvision's ``ColorJitter`` with brightness b, contrast c and saturation s, applied in this order, is one
    affine map of a pixel x if nothing is clipped in between. Let g be the luma weights and m the mean luma of the image.
    Brightness gives b x, contrast gives c b x + (1 - c) b m, and saturation mixes the result with its luma; together
    b c (s I + (1 - s) 1 g^T) x + (1 - c) b m.

    Images of other than 3 bands have no luma. Each band changes about its own mean m by brightness and contrast,
    b c x + (1 - c) b m, with the same factors for all bands, and saturation has no effect.

    Args:
        crop_size: (height, width) of the result in pixels.
        scale_range: (smallest, largest) scale, drawn uniformly; 1 keeps the file's resolution, 0.5 halves it.
        max_class_share: A window is drawn again, up to 10 times, if one class has more than this share of its labelled
            pixels, or if it has no labelled pixel; 1 disables this.
        flip: Flip horizontally with probability 1/2.
        color_jitter: Brightness b, contrast c and saturation s are drawn uniformly from [1 - color_jitter,
            1 + color_jitter].
        max_side: An image with a longer side above this is first shrunk to it; ``scale_range`` applies to the result.
        rare_crop_share: Probability that a window is centred on a pixel of a random class of the mask, drawn with
            ``class_weights``; pixels are searched in every fourth row and column only.
        class_weights: (C,) weights of the classes for ``rare_crop_share``.
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
        """Draw the parameters for a pair of Image and Mask; see `draw`."""
        return self.draw(next(value for value in flat_inputs if isinstance(value, tv_tensors.Mask)).as_subclass(Tensor))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Transform the image (bands,H,W) or the mask (H,W) uint8 with parameters from `draw`.

        Images are uint8, or float32 in [0, 1].
        """
        pixels = inpt.as_subclass(Tensor)  # an operation on a tv_tensor costs as much as a small resize
        cut = params["window"].cut(pixels)
        return tv_tensors.wrap(
            self.finish_mask(cut, params) if pixels.ndim == 2 else self.finish_image(cut, params), like=inpt
        )

    def draw(self, mask: Tensor) -> dict[str, Any]:
        """Draw window, flip and colour factors for a mask (H,W) with torch's global generator.

        Returns:
            ``window``, the part of image and mask to cut, and further parameters of `finish_image` and
            `finish_mask`.
        """
        (scale, flip, *positions), factors = torch.rand(2 + 2 * _TRIES).tolist(), 2 * torch.rand(3) - 1
        low, high = self.scale_range
        total = (low + (high - low) * scale) * shrinking(mask.shape, self.max_side)
        height, width = (max(1, round(side / total)) for side in self.crop_size)
        top = left = 0
        for vertical, horizontal in zip(positions[::2], positions[1::2], strict=True):
            top, left = _start(mask.shape[0], height, vertical), _start(mask.shape[1], width, horizontal)
            if self.max_class_share >= 1 or self._is_mixed(mask, top=top, left=left, height=height, width=width):
                break
        if self.rare_crop_share and float(torch.rand(())) < self.rare_crop_share:
            top, left = self._around_a_rare_class(mask, height, width) or (top, left)
        full_height, full_width = mask.shape
        window = Window(
            top=max(top, 0),
            left=max(left, 0),
            bottom=min(top + height, full_height),
            right=min(left + width, full_width),
        )
        return {
            "window": window,
            # Left, right, top, bottom: pixels of the drawn window outside the image
            "padding": (window.left - left, left + width - window.right, window.top - top, top + height - window.bottom),
            "flip": self.flip and flip < 0.5,
            "factors": 1 + self.color_jitter * factors if self.color_jitter else None,
        }

    def finish_image(self, cut: Tensor, params: dict[str, Any]) -> Tensor:
        """Resize, pad, flip and colour the cut part (bands,h,w) of an image to (bands,*crop_size)."""
        size, padding = self._resized_part(params)
        result = F.pad(F.interpolate(cut[None], size, mode="bilinear", antialias=True)[0], padding)
        if params["flip"]:
            result = result.flip(-1)
        return result if params["factors"] is None else _scale_color(result, *params["factors"])

    def finish_mask(self, cut: Tensor, params: dict[str, Any]) -> Tensor:
        """Resize, pad and flip the cut part (h,w) uint8 of a mask to ``crop_size``."""
        size, padding = self._resized_part(params)
        result = F.pad(F.interpolate(cut[None, None], size, mode="nearest")[0, 0], padding, value=IGNORE_INDEX)
        return result.flip(-1) if params["flip"] else result

    def _resized_part(self, params: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return (height, width) of the cut part in the result, and the padding (left, right, top, bottom) around it."""
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
        """Return top and left of a window centred on a pixel of a random class; None if no pixel is labelled."""
        assert self.class_weights is not None
        grid = mask[::_GRID, ::_GRID]
        present = torch.bincount(grid.flatten(), minlength=len(self.class_weights))[: len(self.class_weights)] > 0
        weights = self.class_weights * present
        if not weights.any():
            return None
        pixels = (grid == int(torch.multinomial(weights, 1))).nonzero()
        row, column = (_GRID * pixels[int(torch.randint(len(pixels), ()))]).tolist()
        top, left = row - height // 2, column - width // 2
        return _clamp_start(mask.shape[0], height, top), _clamp_start(mask.shape[1], width, left)

    def _is_mixed(self, mask: Tensor, *, top: int, left: int, height: int, width: int) -> bool:
        """Whether a window has labelled pixels and no class exceeds ``max_class_share`` of them."""
        step = max(1, min(height, width) // _PROBE)
        probe = mask[max(top, 0) : top + height : step, max(left, 0) : left + width : step]
        counts = torch.bincount(probe.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        labelled = int(counts.sum())
        return labelled > 0 and int(counts.max()) <= self.max_class_share * labelled


def _start(full: int, part: int, position: float) -> int:
    """Return the start of a window of ``part`` of ``full`` pixels at a relative position in [0, 1).

    The window lies inside the image, or a smaller image lies inside the window.
    """
    low, high = min(0, full - part), max(0, full - part)
    return low + int(position * (high - low + 1))


def _clamp_start(full: int, part: int, start: int) -> int:
    """Return the nearest start for which the window lies inside the image, or a smaller image inside the window."""
    return max(min(0, full - part), min(max(0, full - part), start))


def _scale_color(image: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Apply the affine colour map of `TrainingTransform` to (bands,H,W), uint8 or float32 in [0, 1]."""
    pixels = image.flatten(1).float()  # (bands, H*W)
    rounding = 0.0 if image.is_floating_point() else 0.5  # the conversion to integers truncates
    if len(image) != 3:
        colored = torch.lerp(pixels.mean(1, keepdim=True), pixels, contrast).mul_(brightness).add_(rounding)
        return _limited(colored, image)
    matrix = brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * _GREY.expand(3, 3))
    offset = (1 - contrast) * brightness * (_GREY @ pixels.mean(1))
    return _limited(torch.addmm(offset.expand(1) + rounding, matrix, pixels), image)


def _limited(values: Tensor, image: Tensor) -> Tensor:
    """Limit values to the range of ``image``, 0..255 or 0..1, and return them in its type and shape."""
    return values.clamp_(0, 1 if image.is_floating_point() else 255).to(image.dtype).view(image.shape)


def shrinking(size: tuple[int, ...], max_side: int | None) -> float:
    """Return the factor, at most 1, that shrinks the longer side of (height, width) to ``max_side``."""
    return 1.0 if max_side is None else min(1.0, max_side / max(size))


def resize_image(image: Tensor, image_scale: float) -> Tensor:
    """Resize an image (bands,H,W) by ``image_scale`` for evaluation; masks keep the size at which they are scored."""
    if image_scale == 1:
        return image
    size = [max(1, round(side * image_scale)) for side in image.shape[-2:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
