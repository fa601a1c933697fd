"""Inference on whole images: sliding windows, several scales, mirroring; for any callable that maps images to logits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mcseg.kernels import neighbours, predicted_classes

_BAND = 1 << 24  # logits that are resized at once: 64 MB in float32
_ROWS = 32  # rows of averaged probabilities that are resized at once; a window of 512 rows makes the buffer 546 rows high
_STRIP = 4096  # columns of labels that are computed at once with windows; eight windows of 512 columns side by side
_FLOOR = 0.01  # weight at the border of a window, relative to that in the middle


@dataclass(frozen=True)
class Inference:
    """Prediction of labels for whole images; all settings are plain types, so that YAML can set them.

    By default the network gets the whole image, and the labels are the argmax of its logits, resized to the requested size.
    With several windows, several scales or mirroring, the labels are the argmax of averaged probabilities: the softmax of
    the logits in float32, blended over overlapping windows with weights that fall towards the border, resized bilinearly to
    the requested size and summed over the scales. Each window is passed through the network once per scale, and twice with
    mirroring.

    Memory: rows of windows are computed from top to bottom. For each scale s, the buffer contains only the rows of
    probabilities that are incomplete or not yet converted to labels, at most h + 34 rows for windows of h rows. For images
    ``(N, B, H, W)`` and C classes, it takes::

        4 N C (h + 34) s min(W, 4096) bytes

    for each scale, regardless of the image's height. Labels are computed in strips of at most 4096 columns; windows that
    cross the border of two strips are computed twice. Further memory is needed for the image, its scaled copies (s^2 times
    its size; uint8 stays uint8), the labels, the network with ``batch`` windows, and 32 rows during resizing. Without a
    window, h is the height of the scaled image, so several scales or mirroring take 4 N C s^2 H W bytes for each scale.

    Args:
        window: ``(height, width)`` in pixels of the scaled image, at most the size of that image; None is the whole image.
        overlap: Smallest overlap of neighbouring windows as a share of the window, at least 0 and below 1. Windows are
            spread evenly from border to border.
        scales: Factors > 0 by which images are resized, bilinearly with antialiasing.
        flip: Whether to average with the horizontally mirrored image.
        batch: Number of windows per forward pass, from the same row of windows.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> import torch
        >>> from mcseg.evaluation import Inference
        >>> inference = Inference(window=(32, 32), flip=True)
        >>> network = torch.nn.Conv2d(3, 2, 1)  # any callable from images (N, 3, H, W) to logits (N, C, H, W)
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
        """Predict the labels of images. The caller sets evaluation mode and disables gradients.

        Args:
            network: Callable from images ``(N, B, h, w)`` to logits ``(N, C, h', w')`` of any floating-point dtype, C at
                most 256.
            image: ``(N, B, H, W)``, uint8 0..255 or floating point 0..1: a tensor, or an object with ``shape``, ``ndim``,
                ``device`` and ``[:, :, rows, columns]``, which reads windows when they are needed.
            size: ``(height, width)`` of the labels.

        Returns:
            ``(N, height, width)`` uint8 train ids on the device of the image.

        Raises:
            ValueError: The image or the size is empty, or there are more than 256 classes, which do not fit into uint8.
        """
        if image.ndim != 4 or min(image.shape) < 1:
            raise ValueError(f"image: found shape {tuple(image.shape)}, expected (N, B, H, W) without an empty dimension")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: found {tuple(size)}, expected (height, width), each at least 1")
        height, width = size
        scaled = [_rescale(image, scale) for scale in self.scales]
        tiles = [self._tile(part.shape[-2:]) for part in scaled]
        if len(scaled) == 1 and not self.flip and tiles[0] == tuple(scaled[0].shape[-2:]):  # nothing to average
            return labels_at(network(scaled[0][:, :, :, :]), size).to(image.device)

        # each band of output rows spans at most _ROWS rows at any scale, which limits the buffers
        step = max(1, _ROWS * height // max(height, *(part.shape[2] for part in scaled)))
        bands = [slice(top, min(top + step, height)) for top in range(0, height, step)]
        strips = 1 if self.window is None else -(-width // _STRIP)
        labels = torch.empty((len(image), height, width), dtype=torch.uint8, device=image.device)
        for index in range(strips):
            strip = slice(index * width // strips, (index + 1) * width // strips)
            sources = [
                _Rows(self, network, image=part, tile=tile, bands=bands, columns=_neighbours(width, part.shape[3], strip))
                for part, tile in zip(scaled, tiles, strict=True)
            ]
            for band in bands:
                first, *others = (source.resized(band) for source in sources)
                for rows in others:
                    first.add_(rows)
                labels[:, band, strip] = predicted_classes(first)
        return labels

    def is_plain(self, size: tuple[int, int] | torch.Size) -> bool:
        """Whether the network sees an image of this ``(height, width)`` once, whole and unscaled."""
        return self.scales == (1.0,) and not self.flip and self._tile(size) == tuple(size)

    def _tile(self, size: tuple[int, int] | torch.Size) -> tuple[int, int]:
        """Compute ``(height, width)`` of the windows for an image of this size."""
        height, width = size
        return (height, width) if self.window is None else (min(self.window[0], height), min(self.window[1], width))


class _Rows:
    """Averaged probabilities of a strip at one scale, computed on request from top to bottom in a ring buffer.

    Row r of the scaled image is row r modulo the length of the buffer. A row of windows is computed only when a row below
    its top is requested, so a buffer for one window and one request never overwrites rows that are still needed.

    Args:
        settings: Settings, read for overlap, mirroring and batch.
        network: See `Inference.__call__`.
        image: ``(N, B, H, W)`` scaled images.
        tile: ``(height, width)`` of the windows.
        bands: Output rows of each request, from top to bottom.
        columns: Neighbouring columns of the strip's labels, see `_neighbours`.
    """

    def __init__(
        self,
        settings: Inference,
        network: Callable[[Tensor], Tensor],
        *,
        image: Tensor,
        tile: tuple[int, int],
        bands: list[slice],
        columns: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        self._network, self._image, self._tile = network, image, tile
        self._flip, self._batch = settings.flip, settings.batch
        height, width = image.shape[-2:]
        left, right, self._right_share = columns
        self._start, self._stop = int(left[0]), int(right[-1]) + 1  # columns of the image that the strip needs
        self._left, self._right = left - self._start, right - self._start
        self._resized = bool(self._right_share.any()) or not torch.equal(self._left, torch.arange(len(left)))
        self._window_rows = window_starts(height, tile[0], settings.overlap)
        self._row_weights = _window_weights(height, tile[0], self._window_rows)
        starts = window_starts(width, tile[1], settings.overlap)
        overlaps = [self._start - tile[1] < start < self._stop for start in starts]
        self._window_columns = [start for start, overlaps_strip in zip(starts, overlaps, strict=True) if overlaps_strip]
        self._column_weights = _window_weights(width, tile[1], starts)[torch.tensor(overlaps)]
        self._above, self._below, self._below_share = _neighbours(bands[-1].stop, height)
        requested = max(int(self._below[band][-1] - self._above[band][0]) + 1 for band in bands)
        self._length = min(height, tile[0] + requested)
        self._next = 0  # index of the next row of windows
        self._end = 0  # first row without a contribution
        self._buffer: Tensor | None = None

    def resized(self, band: slice) -> Tensor:
        """Compute the probabilities ``(N, C, rows, columns)`` of a band of output rows; bands come from top to bottom."""
        above, below, share = self._above[band], self._below[band], self._below_share[band]
        while self._complete <= int(below[-1]):
            self._add_windows()
        assert self._buffer is not None  # the loop ran at least once
        device = self._buffer.device
        upper = self._buffer.index_select(2, (above % self._length).to(device))
        lower = self._buffer.index_select(2, (below % self._length).to(device))
        rows = upper.lerp_(lower, share[:, None].to(device))
        if not self._resized:
            return rows[..., : len(self._left)]
        return torch.lerp(rows[..., self._left], rows[..., self._right], self._right_share.to(device))

    @property
    def _complete(self) -> int:
        """Number of rows, from the top, that have all their contributions."""
        return self._window_rows[self._next] if self._next < len(self._window_rows) else self._image.shape[2]

    def _add_windows(self) -> None:
        """Add the probabilities of the next row of windows."""
        top = self._window_rows[self._next]
        bottom = top + self._tile[0]
        for first in range(0, len(self._window_columns), self._batch):
            starts = self._window_columns[first : first + self._batch]
            windows = [self._image[:, :, top:bottom, start : start + self._tile[1]] for start in starts]
            added = self._probabilities(torch.cat(windows))
            if self._buffer is None:  # the first logits give the number of classes
                _check_classes(added.shape[1])
                shape = (len(self._image), added.shape[1], self._length, self._stop - self._start)
                self._buffer = added.new_empty(shape)
                self._row_weights, self._column_weights = self._row_weights.to(added), self._column_weights.to(added)
            if first == 0:
                for rows, _ in self._buffer_slices(self._end, bottom):
                    self._buffer[:, :, rows] = 0
                self._end = bottom
            for index, part in enumerate(added.chunk(len(starts)), start=first):
                start = self._window_columns[index] - self._start  # in columns of the strip
                inside = slice(max(0, -start), self._stop - self._start - start)  # columns of the window inside the strip
                weights = self._row_weights[self._next][:, None] * self._column_weights[index, inside]
                for rows, own in self._buffer_slices(top, bottom):
                    section = self._buffer[:, :, rows, max(0, start) : start + self._tile[1]]
                    section.addcmul_(part[:, :, own, inside], weights[own])
        self._next += 1

    def _probabilities(self, windows: Tensor) -> Tensor:
        """Compute float32 probabilities ``(N, C, h, w)`` of windows; with mirroring the sum of both has the same argmax."""
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
        length: Number of pixels to cover.
        window: Pixels of a window, at most ``length``.
        overlap: Smallest overlap of neighbouring windows as a share of the window, at least 0 and below 1.

    Returns:
        First pixel of each window, ascending; the smallest number of windows with that overlap.
    """
    stride = max(1, int(window * (1 - overlap) + 1e-6))  # 768 * (1 - 1 / 3) may lie just below 512
    gaps = -(-(length - window) // stride)
    return [index * (length - window) // gaps for index in range(gaps)] + [length - window]


def labels_at(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Compute the argmax of logits after bilinear resizing, in bands of rows.

    Args:
        logits: ``(N, C, h, w)`` floating point.
        size: ``(H, W)`` of the labels.

    Returns:
        ``(N, H, W)`` uint8 train ids.

    Raises:
        ValueError: There are more than 256 classes, which do not fit into uint8.
    """
    _check_classes(logits.shape[1])
    labels = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
    for band, resized in bands_at(logits, size):
        labels[:, band] = predicted_classes(resized)
    return labels


def resize_labels(target: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize labels ``(N, h, w)`` to a size ``(H, W)`` by the rule ``"nearest"`` of `torch.nn.functional.interpolate`."""
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

    A band takes 64 MB; the resized logits of an image of 20 megapixels would take gigabytes.

    Args:
        logits: ``(N, C, h, w)`` floating point.
        size: ``(H, W)`` of the result.

    Yields:
        Rows of the result, and their logits ``(N, C, rows, W)`` in float32. Logits that have the size already are yielded
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
    """Find the two neighbours of each pixel along one axis in bilinear resizing with ``align_corners=False``.

    Args:
        length: Pixels of the result.
        source: Pixels of the source.
        part: Pixels of the result to compute.

    Returns:
        Index of the first and of the second neighbour, int64, and weight of the second, float32; one value per pixel, on the
        CPU.
    """
    above, below, share = (values[part] for values in neighbours(source, length, align_corners=False, dtype=torch.float32))
    return above, below, share


def _window_weights(length: int, window: int, starts: list[int]) -> Tensor:
    """Compute weights of windows along one axis: a raised cosine with a floor, normalised to the sum 1 at each pixel.

    The weight of a pixel in a window is the product of its weights along both axes. These products sum to 1 as well, so
    blended probabilities need no division. A single window has the weight 1.

    Args:
        length: Pixels of the axis.
        window: Pixels of a window.
        starts: First pixel of each window.

    Returns:
        ``(windows, window)`` float64, positive.
    """
    middle = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    weight = _FLOOR + (1 - _FLOOR) * (math.pi * middle).sin() ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += weight
    return torch.stack([weight / total[start : start + window] for start in starts])


def _rescale(image: Tensor, scale: float) -> Tensor:
    """Resize images ``(N, B, H, W)`` by a factor, to at least one pixel per side; uint8 stays uint8."""
    size = tuple(max(1, round(side * scale)) for side in image.shape[-2:])
    if size == tuple(image.shape[-2:]):
        return image
    image = image[:, :, :, :]  # reads an image that is read in windows
    if image.dtype != torch.uint8 or image.device.type == "cpu":
        if size[1] == 1:  # torch 2.15 raises or gives wrong values for planar uint8 images that become one pixel wide
            image = image.contiguous(memory_format=torch.channels_last)
        return F.interpolate(image, size, mode="bilinear", antialias=True)
    scaled = image.new_empty((*image.shape[:2], *size))
    for channel in range(image.shape[1]):  # GPUs resize floating point only; single channels need a third of the memory
        resized = F.interpolate(image[:, channel : channel + 1].float(), size, mode="bilinear", antialias=True)
        scaled[:, channel : channel + 1] = resized.round_().clamp_(0, 255)
    return scaled
