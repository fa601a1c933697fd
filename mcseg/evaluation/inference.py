"""Inference on whole images: sliding windows, several scales and mirroring, for any network from images to logits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels import neighbours, predicted_classes

_BAND = 1 << 24  # logits that are resized at once: 64 MB in float32
_ROWS = 32  # rows of averaged probabilities that are resized at once; few compared with the rows of a window
_STRIP = 4096  # columns of labels that are computed at once with windows; several windows of the usual sizes
_FLOOR = 0.01  # weight at the border of a window, relative to that in the middle


@dataclass(frozen=True)
class Inference:
    """Prediction of labels for whole images; all settings are plain types, so that YAML can set them.

    By default the network gets the whole image, and the labels are the argmax of its logits, resized to the requested size.
    With several windows, several scales or mirroring, the labels are the argmax of averaged probabilities: the softmax of
    the logits in float32, blended over overlapping windows with weights that fall towards the border, resized bilinearly to
    the requested size and summed over the scales. Each window passes the network once per scale, and twice with mirroring.

    Memory: rows of windows are computed from top to bottom. For each scale s, the buffer holds only the rows of
    probabilities that are incomplete or not yet converted to labels, at most h + 34 rows for windows of h rows. For images
    (N,3,H,W) and C classes, it takes::

        4 N C (h + 34) s min(W, 4096) bytes

    for each scale, whatever the height of the image. Labels are computed in strips of at most 4096 columns; windows that
    cross the border of two strips are computed twice. Further memory is needed for the image, its scaled copies (s^2 times
    its size; uint8 stays uint8), the labels, the network with ``batch`` windows, and 32 rows during resizing. Without a
    window, h is the height of the scaled image, so several scales or mirroring take 4 N C s^2 H W bytes for each scale.

    Args:
        window: (height, width) in pixels of the scaled image, at most the size of that image; None is the whole image.
        overlap: smallest overlap of neighbouring windows as a share of the window, at least 0 and below 1. Windows are
            spread evenly from border to border.
        scales: factors > 0 by which images are resized, bilinearly with antialiasing.
        flip: whether to average with the horizontally mirrored image.
        batch: number of windows per forward pass, from the same row of windows.

    Raises:
        ValueError: a setting is out of range.

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
            raise ValueError(f"window: found {self.window}, expected (height, width), each at least 1, or None")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: found {self.overlap}, expected a number >= 0 and < 1")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales: found {self.scales}, expected one or more finite factors > 0")
        if self.batch < 1:
            raise ValueError(f"batch: found {self.batch}, expected at least 1")

    def __call__(self, network: Callable[[Tensor], Tensor], image: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        """Predict the labels of images. The caller sets evaluation mode and switches gradients off.

        Args:
            network: callable from images (N,3,h,w) to logits (N,C,h',w') of any floating-point dtype, C at most 256.
            image: (N,3,H,W), uint8 0..255 or floating point 0..1.
            size: (height, width) of the labels.

        Returns:
            (N,height,width) uint8 train ids on the device of the image.

        Raises:
            ValueError: the image or the size is empty, or there are more than 256 classes, which uint8 cannot hold.
        """
        if image.ndim != 4 or min(image.shape) < 1:
            raise ValueError(f"image: found shape {tuple(image.shape)}, expected (N,3,H,W) without an empty dimension")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: found {tuple(size)}, expected (height, width), each at least 1")
        height, width = size
        scaled = [_rescale(image, scale) for scale in self.scales]
        tiles = [self._tile(part.shape[-2:]) for part in scaled]
        if len(scaled) == 1 and not self.flip and tiles[0] == tuple(scaled[0].shape[-2:]):  # nothing to average
            return labels_at(network(scaled[0]), size).to(image.device)

        # each band of output rows spans at most _ROWS rows at any scale, which limits the buffers
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
        """Whether an image of ``size`` (height, width) passes the network once and unchanged, so nothing is averaged."""
        return self.scales == (1.0,) and not self.flip and self._tile(size) == tuple(size)

    def _tile(self, size: tuple[int, int] | torch.Size) -> tuple[int, int]:
        """Compute (height, width) of the windows for an image of this size."""
        height, width = size
        return (height, width) if self.window is None else (min(self.window[0], height), min(self.window[1], width))


class _Rows:
    """Averaged probabilities of a strip at one scale, computed on request from top to bottom in a ring buffer.

    Row r of the scaled image is row r modulo the length of the buffer. A row of windows is computed only when a row below
    its top is requested, so a buffer for one window and one request never overwrites rows that are still needed.

    Args:
        settings: overlap, mirroring and batch.
        network: see :meth:`Inference.__call__`.
        image: (N,3,H,W) scaled images.
        tile: (height, width) of the windows.
        bands: output rows of each request, from top to bottom.
        columns: neighbouring columns of the strip's labels, see :func:`_neighbours`.
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
        left, right, self._share_right = columns
        self._start, self._stop = int(left[0]), int(right[-1]) + 1  # columns of the image that the strip needs
        self._left, self._right = left - self._start, right - self._start
        self._resized = bool(self._share_right.any()) or not torch.equal(self._left, torch.arange(len(left)))
        self._tops = window_starts(height, tile[0], settings.overlap)
        self._down = _window_weights(height, tile[0], self._tops)
        lefts = window_starts(width, tile[1], settings.overlap)
        overlaps = [self._start - tile[1] < start < self._stop for start in lefts]
        self._lefts = [start for start, overlaps_strip in zip(lefts, overlaps, strict=True) if overlaps_strip]
        self._across = _window_weights(width, tile[1], lefts)[torch.tensor(overlaps)]
        self._above, self._below, self._share = _neighbours(bands[-1].stop, height)
        requested = max(int(self._below[band][-1] - self._above[band][0]) + 1 for band in bands)
        self._length = min(height, tile[0] + requested)
        self._next = 0  # index of the next row of windows
        self._end = 0  # first row without a contribution
        self._buffer: Tensor | None = None

    def resized(self, band: slice) -> Tensor:
        """Compute the probabilities (N,C,rows,columns) of a band of output rows; bands come from top to bottom."""
        above, below, share = self._above[band], self._below[band], self._share[band]
        while self._complete <= int(below[-1]):
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
    def _complete(self) -> int:
        """Number of rows, from the top, that have all their contributions."""
        return self._tops[self._next] if self._next < len(self._tops) else self._image.shape[2]

    def _add_windows(self) -> None:
        """Add the probabilities of the next row of windows."""
        top = self._tops[self._next]
        bottom = top + self._tile[0]
        for first in range(0, len(self._lefts), self._batch):
            lefts = self._lefts[first : first + self._batch]
            windows = [self._image[:, :, top:bottom, left : left + self._tile[1]] for left in lefts]
            added = self._probabilities(torch.cat(windows))
            if self._buffer is None:  # the first logits give the number of classes
                _check_classes(added.shape[1])
                shape = (len(self._image), added.shape[1], self._length, self._stop - self._start)
                self._buffer = added.new_empty(shape)
                self._down, self._across = self._down.to(added), self._across.to(added)
            if first == 0:
                for rows, _ in self._buffer_slices(self._end, bottom):
                    self._buffer[:, :, rows] = 0
                self._end = bottom
            for index, part in enumerate(added.chunk(len(lefts)), start=first):
                left = self._lefts[index] - self._start
                inside = slice(max(0, -left), self._stop - self._start - left)  # columns of the window inside the strip
                weights = self._down[self._next][:, None] * self._across[index, inside]
                for rows, own in self._buffer_slices(top, bottom):
                    section = self._buffer[:, :, rows, max(0, left) : left + self._tile[1]]
                    section.addcmul_(part[:, :, own, inside], weights[own])
        self._next += 1

    def _probabilities(self, windows: Tensor) -> Tensor:
        """Compute probabilities (N,C,h,w) float32 of windows; with mirroring the sum of both, which has the same argmax."""
        total = self._softmax(windows)
        return total.add_(self._softmax(windows.flip(-1)).flip(-1)) if self._flip else total

    def _softmax(self, windows: Tensor) -> Tensor:
        logits = self._network(windows).detach().float()  # without detach() the buffer would keep every graph
        if tuple(logits.shape[-2:]) != self._tile:
            logits = F.interpolate(logits, self._tile, mode="bilinear", align_corners=False)
        return logits.softmax(1)

    def _buffer_slices(self, top: int, bottom: int) -> Iterator[tuple[slice, slice]]:
        """Locate the rows top..bottom in the ring buffer, in one or two pieces.

        Yields:
            Rows of the buffer, and the same rows counted from ``top``.
        """
        start, count = top % self._length, bottom - top
        first = min(count, self._length - start)
        yield slice(start, start + first), slice(0, first)
        if first < count:
            yield slice(0, count - first), slice(first, count)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Spread windows evenly over a length, from border to border.

    Args:
        length: number of pixels to cover.
        window: pixels of a window, at most ``length``.
        overlap: smallest overlap of neighbouring windows as a share of the window, at least 0 and below 1.

    Returns:
        First pixel of each window, ascending; the smallest number of windows with that overlap.
    """
    stride = max(1, int(window * (1 - overlap) + 1e-6))  # 768 * (1 - 1 / 3) may lie just below 512
    gaps = -(-(length - window) // stride)
    return [index * (length - window) // gaps for index in range(gaps)] + [length - window]


def labels_at(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Compute the argmax of logits after bilinear resizing, in bands of rows.

    Args:
        logits: (N,C,h,w) floating point.
        size: (H,W) of the labels.

    Returns:
        (N,H,W) uint8 train ids.

    Raises:
        ValueError: there are more than 256 classes, which uint8 cannot hold.
    """
    _check_classes(logits.shape[1])
    labels = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    for band, resized in bands_at(logits, size):
        labels[:, band] = predicted_classes(resized)
    return labels


def resize_labels(target: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize labels (N,h,w) to ``size`` (H,W) by the rule ``"nearest"`` of `torch.nn.functional.interpolate`."""
    if target.shape[-2:] == size:
        return target
    rows, columns = (
        torch.arange(new, device=target.device) * old // new for new, old in zip(size, target.shape[-2:], strict=True)
    )
    return target[:, rows[:, None], columns]


def _check_classes(num_classes: int) -> None:
    if num_classes > 256:
        raise ValueError(f"logits: found {num_classes} classes, expected at most 256; the labels are uint8")


def bands_at(logits: Tensor, size: tuple[int, int] | torch.Size) -> Iterator[tuple[slice, Tensor]]:
    """Resize logits bilinearly, one band of rows at a time.

    A band takes 64 MB, where the resized logits of an image of 20 megapixels would take gigabytes.

    Args:
        logits: (N,C,h,w) floating point.
        size: (H,W) of the result.

    Yields:
        Rows of the result, and their logits (N,C,rows,W) in float32. Logits that have the size already are yielded
        unchanged, in one band.
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
    """Find the two neighbours of each pixel along one axis in bilinear resizing without aligned corners.

    Args:
        length: pixels of the result.
        source: pixels of the source.
        part: pixels of the result to compute.

    Returns:
        Index of the first and of the second neighbour, int64, and weight of the second, float32; one value per pixel, on the
        CPU.
    """
    above, below, share = (values[part] for values in neighbours(source, length, False, torch.float32))
    return above, below, share


def _window_weights(length: int, window: int, starts: list[int]) -> Tensor:
    """Compute weights of windows along one axis: a raised cosine with a floor, normalised to the sum 1 at each pixel.

    The weight of a pixel in a window is the product of its weights along both axes. These products sum to 1 as well, so
    blended probabilities need no division. A single window has the weight 1.

    Args:
        length: pixels of the axis.
        window: pixels of a window.
        starts: first pixel of each window.

    Returns:
        (windows, window) float64, positive.
    """
    middle = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    weight = _FLOOR + (1 - _FLOOR) * (math.pi * middle).sin() ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += weight
    return torch.stack([weight / total[start : start + window] for start in starts])


def _rescale(image: Tensor, scale: float) -> Tensor:
    """Resize images (N,3,H,W) by a factor, to at least one pixel per side; uint8 stays uint8."""
    size = tuple(max(1, round(side * scale)) for side in image.shape[-2:])
    if size == tuple(image.shape[-2:]):
        return image
    if image.dtype != torch.uint8 or image.device.type == "cpu":
        if size[1] == 1:  # torch 2.15 raises or gives wrong values for planar uint8 images that become one pixel wide
            image = image.contiguous(memory_format=torch.channels_last)
        return F.interpolate(image, size, mode="bilinear", antialias=True)
    scaled = image.new_empty((*image.shape[:2], *size))
    for channel in range(image.shape[1]):  # GPUs resize floating point only; one channel at a time takes a third of memory
        resized = F.interpolate(image[:, channel : channel + 1].float(), size, mode="bilinear", antialias=True)
        scaled[:, channel : channel + 1] = resized.round_().clamp_(0, 255)
    return scaled
