"""Inference over whole images with a network that maps images to logits: sliding windows, several scales, mirroring."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels import predicted_classes

_BAND = 1 << 24  # logits that are resized at once: 64 MB in float32
_ROWS = 32  # rows of averaged probabilities that are resized at once, few beside the rows of a window
_STRIP = 4096  # columns of labels that are made at once where there are windows: several windows of the usual sizes
_FLOOR = 0.01  # weight at a window's border as a share of that in its middle


@dataclass(frozen=True)
class Inference:
    """Predicts the labels of whole images; the settings are plain types, so that YAML can name them.

    By default the network sees the image at once, and the labels are the argmax of its logits, resized to the wanted size.
    With several windows, several scales or mirroring, probabilities are averaged: the softmax of the logits in float32,
    blended over overlapping windows with weights that fall towards the window's border, resized bilinearly to the wanted
    size and summed over the scales. Each window passes the network once for each scale, and once more mirrored.

    Memory: rows of windows are computed from the top, and of a scale s only the rows of probabilities are kept that a
    window can still contribute to or that the labels wait for. That are at most h + 34 rows for windows of h rows, thus

        4 N C (h + 34) s min(W, 4096) bytes in float32, whatever the size of the image (N,3,H,W),

    summed over the scales: labels are made in strips of at most 4096 columns, and windows that lie across the border of two
    strips are computed for both. Besides the image, its scaled copies (s^2 times its size, uint8 stays uint8) and
    the labels, there is only the network at work on ``batch`` windows with its probabilities, and 32 rows being resized.
    Without a window h is the height of the scaled image: several scales or mirroring then hold 4 N C s^2 H W bytes for each
    scale.

    Args:
        window: (height, width) in pixels of the scaled image; where the image is smaller, the window shrinks. None takes
            the whole image at once.
        overlap: the least share of a window that its neighbour covers too, at least 0 and below 1. Windows are spread
            evenly from border to border.
        scales: factors by which the image is resized, bilinearly with antialiasing, before the network sees it.
        flip: average with the horizontally mirrored image.
        batch: windows of an image per forward, out of the same row of windows.

    Raises:
        ValueError: settings beyond what is described here.

    Example:
        >>> import torch
        >>> from mcseg.evaluation import Inference
        >>> inference = Inference(window=(32, 32), flip=True)
        >>> network = torch.nn.Conv2d(3, 2, 1)  # any callable from images (N,3,H,W) to logits (N,C,H,W)
        >>> inference(network, torch.rand(1, 3, 40, 60), (80, 120)).shape  # labels at another size
        torch.Size([1, 80, 120])
    """

    window: tuple[int, int] | None = None
    overlap: float = 0.5
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 1):
            raise ValueError(f"window: found {self.window}; expected (height, width), each at least 1, or None")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: found {self.overlap}; expected at least 0 and below 1")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales: found {self.scales}; expected one or more factors above 0")
        if self.batch < 1:
            raise ValueError(f"batch: found {self.batch}; expected at least 1")

    def __call__(self, network: Callable[[Tensor], Tensor], image: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        """Predict the labels of images; gradients and the network's mode are the caller's business.

        Args:
            network: callable from images (N,3,h,w) to logits (N,C,h,w) of any floating type, C at most 256.
            image: (N,3,H,W), uint8 0..255 or floating point 0..1.
            size: (height, width) of the labels.

        Returns:
            (N,height,width) uint8 train ids on the image's device.

        Raises:
            ValueError: an empty image or size, or more than 256 classes, which uint8 cannot hold.
        """
        if image.ndim != 4 or min(image.shape) < 1:
            raise ValueError(f"image: found shape {tuple(image.shape)}; expected (N,3,H,W), nothing of it empty")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: found {tuple(size)}; expected (height, width), each at least 1")
        height, width = size
        scaled = [_scaled(image, scale) for scale in self.scales]
        tiles = [self._tile(part.shape[-2:]) for part in scaled]
        if len(scaled) == 1 and not self.flip and tiles[0] == tuple(scaled[0].shape[-2:]):  # nothing to average
            return labels_at(network(scaled[0]), size).to(image.device)

        # Bands of output rows that stretch over at most _ROWS rows at any scale, which bounds what the scales keep
        step = max(1, _ROWS * height // max(height, *(part.shape[2] for part in scaled)))
        bands = [slice(top, min(top + step, height)) for top in range(0, height, step)]
        strips = 1 if self.window is None else -(-width // _STRIP)
        labels = torch.empty((len(image), height, width), dtype=torch.uint8, device=image.device)
        for index in range(strips):
            strip = slice(index * width // strips, (index + 1) * width // strips)
            sources = [
                _Rows(self, network, part, tile, bands, _neighbours(width, part.shape[3], strip))
                for part, tile in zip(scaled, tiles, strict=True)
            ]
            for band in bands:
                first, *others = (source.resized(band) for source in sources)
                for rows in others:
                    first.add_(rows)
                labels[:, band, strip] = predicted_classes(first)
        return labels

    def is_plain(self, size: tuple[int, int] | torch.Size) -> bool:
        """Whether an image of (height, width) passes the network once, as it is, so that its logits are all there is."""
        return self.scales == (1.0,) and not self.flip and self._tile(size) == tuple(size)

    def _tile(self, size: tuple[int, int] | torch.Size) -> tuple[int, int]:
        """(height, width) of the windows of an image of this size."""
        height, width = size
        return (height, width) if self.window is None else (min(self.window[0], height), min(self.window[1], width))


class _Rows:
    """Averaged probabilities of a strip of one scale, computed from the top as they are asked for; the last rows are kept.

    Row r of the scaled image lies in row r modulo the buffer's length. A row of windows is computed only when a row below
    the top of it is asked for, so a buffer for one window and the rows asked for at once loses nothing that is needed.
    """

    def __init__(
        self,
        settings: Inference,
        network: Callable[[Tensor], Tensor],
        image: Tensor,
        tile: tuple[int, int],
        bands: list[slice],
        columns: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        self._network, self._image, self._tile = network, image, tile
        self._flip, self._batch = settings.flip, settings.batch
        height, width = image.shape[-2:]
        left, right, self._share_right = columns  # of the strip's labels
        self._start, self._stop = int(left[0]), int(right[-1]) + 1  # columns of the image that they lie between
        self._left, self._right = left - self._start, right - self._start
        self._resized = bool(self._share_right.any()) or not torch.equal(self._left, torch.arange(len(left)))
        self._tops = window_starts(height, tile[0], settings.overlap)
        self._down = _shares(height, tile[0], self._tops)
        lefts = window_starts(width, tile[1], settings.overlap)
        reaching = [self._start - tile[1] < start < self._stop for start in lefts]
        self._lefts = [start for start, reaches in zip(lefts, reaching, strict=True) if reaches]
        self._across = _shares(width, tile[1], lefts)[torch.tensor(reaching)]
        self._above, self._below, self._share = _neighbours(bands[-1].stop, height)
        asked = max(int(self._below[band][-1] - self._above[band][0]) + 1 for band in bands)
        self._length = min(height, tile[0] + asked)
        self._next = 0  # of the rows of windows
        self._end = 0  # rows from here on have had no contribution yet
        self._buffer: Tensor | None = None

    def resized(self, band: slice) -> Tensor:
        """Give the probabilities (N,C,rows,columns) of a band of output rows, which lies below the bands of former calls."""
        above, below, share = self._above[band], self._below[band], self._share[band]
        while self._finished <= int(below[-1]):
            self._add_windows()
        assert self._buffer is not None  # the loop ran at least once
        device = self._buffer.device
        upper = self._buffer.index_select(2, (above % self._length).to(device))
        lower = self._buffer.index_select(2, (below % self._length).to(device))
        rows = upper.lerp_(lower, share[:, None].to(device))
        if not self._resized:
            return rows[..., : len(self._left)]
        return torch.lerp(rows[..., self._left], rows[..., self._right], self._share_right.to(device))

    @property
    def _finished(self) -> int:
        """Rows above this one have all their contributions."""
        return self._tops[self._next] if self._next < len(self._tops) else self._image.shape[2]

    def _add_windows(self) -> None:
        """Add the probabilities of the next row of windows."""
        top = self._tops[self._next]
        bottom = top + self._tile[0]
        for first in range(0, len(self._lefts), self._batch):
            lefts = self._lefts[first : first + self._batch]
            windows = [self._image[:, :, top:bottom, left : left + self._tile[1]] for left in lefts]
            added = self._probabilities(torch.cat(windows))
            if self._buffer is None:  # only now the number of classes is known
                _check_classes(added.shape[1])
                shape = (len(self._image), added.shape[1], self._length, self._stop - self._start)
                self._buffer = added.new_empty(shape)
                self._down, self._across = self._down.to(added), self._across.to(added)
            if first == 0:
                for rows, _ in self._places(self._end, bottom):
                    self._buffer[:, :, rows] = 0
                self._end = bottom
            for index, part in enumerate(added.chunk(len(lefts)), start=first):
                left = self._lefts[index] - self._start
                inside = slice(max(0, -left), self._stop - self._start - left)  # columns of the window that the strip has
                weights = self._down[self._next][:, None] * self._across[index, inside]
                for rows, own in self._places(top, bottom):
                    place = self._buffer[:, :, rows, max(0, left) : left + self._tile[1]]
                    place.addcmul_(part[:, :, own, inside], weights[own])
        self._next += 1

    def _probabilities(self, windows: Tensor) -> Tensor:
        """Probabilities (N,C,h,w) float32 of windows; with mirroring the sum of both, as only the argmax counts."""
        total = self._softmax(windows)
        return total.add_(self._softmax(windows.flip(-1)).flip(-1)) if self._flip else total

    def _softmax(self, windows: Tensor) -> Tensor:
        logits = self._network(windows).detach().float()  # labels have no gradient, and the buffer would keep every graph
        if tuple(logits.shape[-2:]) != self._tile:
            logits = F.interpolate(logits, self._tile, mode="bilinear", align_corners=False)
        return logits.softmax(1)

    def _places(self, top: int, bottom: int) -> Iterator[tuple[slice, slice]]:
        """Where rows top..bottom lie in the buffer, in one piece or two: rows of the buffer, the same counted from top."""
        start, count = top % self._length, bottom - top
        first = min(count, self._length - start)
        yield slice(start, start + first), slice(0, first)
        if first < count:
            yield slice(0, count - first), slice(first, count)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Spread windows evenly over a length, the first and the last one at the borders.

    Args:
        length: pixels to be covered.
        window: pixels of a window, at most ``length``.
        overlap: the least share of a window that its neighbour covers too, at least 0 and below 1.

    Returns:
        First pixel of each window, ascending: as few as keep the overlap.
    """
    stride = max(1, int(window * (1 - overlap) + 1e-6))  # 768 * (1 - 1 / 3) may lie just below 512
    gaps = -(-(length - window) // stride)
    return [index * (length - window) // gaps for index in range(gaps)] + [length - window]


def labels_at(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Predict at another size: argmax of the logits (N,C,h,w) resized bilinearly to ``size`` (H,W), in bands of rows.

    Returns:
        (N,H,W) uint8 train ids.

    Raises:
        ValueError: more than 256 classes, which uint8 cannot hold.
    """
    _check_classes(logits.shape[1])
    labels = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    for band, resized in bands_at(logits, size):
        labels[:, band] = predicted_classes(resized)
    return labels


def _check_classes(num_classes: int) -> None:
    if num_classes > 256:
        raise ValueError(f"logits: found {num_classes} classes, expected at most 256, as labels are uint8")


def bands_at(logits: Tensor, size: tuple[int, int] | torch.Size) -> Iterator[tuple[slice, Tensor]]:
    """Resize logits (N,C,h,w) bilinearly to ``size`` (H,W), a band of rows at a time.

    The resized logits of a photo of 20 megapixels take gigabytes; a band at a time takes 64 MB whatever the size. Logits of
    that size already come as they are, in one band.

    Yields:
        Rows of the result, and their logits (N,C,rows,W): float32 where they were resized.
    """
    height, width = size
    if logits.shape[-2:] == (height, width):
        yield slice(0, height), logits
        return
    logits = logits.float()
    rows = max(1, _BAND // (logits.shape[0] * logits.shape[1] * width))
    if rows >= height:
        yield slice(0, height), F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        return
    for top in range(0, height, rows):
        band = slice(top, min(top + rows, height))
        above, below, share = _neighbours(height, logits.shape[2], band)
        mixed = torch.lerp(logits[:, :, above], logits[:, :, below], share[:, None].to(logits.device))
        yield band, F.interpolate(mixed, (mixed.shape[2], width), mode="bilinear", align_corners=False)


def _neighbours(length: int, source: int, part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """Where ``part`` of ``length`` rows lies between ``source`` rows, as F.interpolate has it without aligned corners.

    Returns:
        The row above and the row below int64, the share of the row below float32, one for each row; on the CPU.
    """
    place = ((torch.arange(length)[part] + 0.5) * (source / length) - 0.5).clamp(min=0)
    above = place.long()
    return above, (above + 1).clamp(max=source - 1), place - above


def _shares(length: int, window: int, starts: list[int]) -> Tensor:
    """Weights of windows along one axis: a raised cosine with a floor, scaled to the sum 1 at each pixel.

    The weight of a window is the product of its weights down and across, so these sum to 1 as well and nothing has to be
    divided afterwards; a window alone has exactly 1.

    Returns:
        (windows, window) float64, positive.
    """
    middle = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    weight = _FLOOR + (1 - _FLOOR) * (math.pi * middle).sin() ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += weight
    return torch.stack([weight / total[start : start + window] for start in starts])


def _scaled(image: Tensor, scale: float) -> Tensor:
    """Resize images (N,3,H,W) by a factor, to at least one pixel; uint8 stays uint8."""
    size = tuple(max(1, round(side * scale)) for side in image.shape[-2:])
    if size == tuple(image.shape[-2:]):
        return image
    if image.dtype != torch.uint8 or image.device.type == "cpu":
        if size[1] == 1:  # torch 2.15 fails or errs on planar uint8 images that become one pixel wide
            image = image.contiguous(memory_format=torch.channels_last)
        return F.interpolate(image, size, mode="bilinear", antialias=True)
    scaled = image.new_empty((*image.shape[:2], *size))
    for channel in range(image.shape[1]):  # other devices resize floating point only: a channel at a time takes a third
        resized = F.interpolate(image[:, channel : channel + 1].float(), size, mode="bilinear", antialias=True)
        scaled[:, channel : channel + 1] = resized.round_().clamp_(0, 255)
    return scaled
