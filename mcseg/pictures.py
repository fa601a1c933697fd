"""Pictures: palette PNGs, overlays, panels with a legend, curves, class shares."""

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Palette = Sequence[tuple[int, int, int]]

_PAPER, _INK = (255, 255, 255), (40, 40, 40)
_SHEET_WIDTH = 300  # of a picture in a contact sheet
_COLUMN_WIDTH = 360  # pixels; smaller images are enlarged, larger ones reduced to it
_FONT_SIZE = 15
_LEGEND_CLASSES = 30  # a legend of more takes more room than the pictures


def void_color(palette: Palette) -> tuple[int, int, int]:
    """Black, or the light colour that PASCAL VOC has for void where black stands for a class."""
    return (224, 224, 192) if (0, 0, 0) in map(tuple, palette) else (0, 0, 0)


def default_palette(classes: int) -> Palette:
    """Distinguishable RGB colours for classes that have none."""
    from matplotlib import colormaps

    colors = colormaps["gist_rainbow"](np.linspace(0, 1, classes))[:, :3]
    return [(int(r), int(g), int(b)) for r, g, b in (255 * colors).round()]


def as_array(picture: Image.Image) -> NDArray[np.uint8]:
    """(H,W,3) uint8 of a picture."""
    return np.asarray(picture.convert("RGB"))


def palette_image(mask: Tensor, palette: Palette) -> Image.Image:
    """Turn (H,W) train ids into a palette image: the pixel values stay the ids."""
    picture = Image.fromarray(mask.to(torch.uint8).numpy()).convert("P")
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    colors[255] = void_color(palette)
    picture.putpalette(colors.tobytes())
    return picture


def grey_image(values: Tensor) -> Image.Image:
    """Turn (H,W) uint8 values into an 8-bit grey image."""
    return Image.fromarray(values.numpy())


def image_picture(image: Tensor) -> Image.Image:
    """Turn (3,H,W) RGB, uint8 or floating point in [0, 1], into a picture."""
    if image.is_floating_point():
        image = (image * 255).round().clamp(0, 255)
    return Image.fromarray(image.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def overlay(image: Tensor, mask: Tensor, palette: Palette, opacity: float = 0.5) -> Image.Image:
    """Blend the coloured mask (H,W) over the image (3,h,w), at the mask's size."""
    colored = palette_image(mask, palette).convert("RGB")
    below = image_picture(image).resize(colored.size, Image.Resampling.BILINEAR)
    return Image.blend(below, colored, opacity)


def panel(rows: Sequence[tuple[Tensor, Tensor, Tensor]], names: Sequence[str], palette: Palette) -> Image.Image:
    """Compose rows of image (3,h,w) | target (H,W) | prediction (H,W) with headings and a legend of the classes.

    Void pixels of the target look void in the prediction as well, as they are not scored. Of more than 30 classes, the
    legend has those that are in the pictures.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    gap, line = 8, _FONT_SIZE + 9
    pictures = []
    for image, target, preds in rows:
        scored = preds.masked_fill(target == 255, 255)
        height = max(1, round(_COLUMN_WIDTH * target.shape[0] / target.shape[1]))
        size = (_COLUMN_WIDTH, height)
        pictures.append(
            [
                image_picture(image).resize(size, Image.Resampling.BILINEAR),
                *(
                    palette_image(mask, palette).convert("RGB").resize(size, Image.Resampling.NEAREST)
                    for mask in (target, scored)
                ),
            ]
        )
    width = 3 * _COLUMN_WIDTH + 4 * gap
    shown = list(range(len(names)))
    if len(names) > _LEGEND_CLASSES:
        found = torch.cat([mask.flatten() for _, target, preds in rows for mask in (target, preds)])
        present = torch.bincount(found, minlength=len(names)) > 0
        shown = [index for index in shown if present[index]]
    entries = [*(names[index] for index in shown), "void"], [*(palette[index] for index in shown), void_color(palette)]
    legend = _legend_lines(*entries, width - 2 * gap, font)
    height = line + sum(row[0].height + gap for row in pictures) + line * len(legend) + gap
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(("image", "target", "prediction")):
        draw.text((gap + column * (_COLUMN_WIDTH + gap), 4), heading, fill=_INK, font=font)
    top = line
    for row in pictures:
        for column, picture in enumerate(row):
            canvas.paste(picture, (gap + column * (_COLUMN_WIDTH + gap), top))
        top += row[0].height + gap
    _draw_legend(draw, legend, gap, top, font)
    return canvas


def contact_sheet(samples: Iterable[tuple[str, Tensor, Tensor]], names: Sequence[str], palette: Palette) -> Image.Image:
    """Compose images beside their coloured labels, two to a line, and a legend with the classes' shares, largest first.

    Args:
        samples: name, image (3,H,W) and labels (H,W) of each; taken one at a time, as only small copies are kept.
        names: of the classes.
        palette: of the classes.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    gap, line = 8, _FONT_SIZE + 9
    counts = torch.zeros(256, dtype=torch.int64)
    cells: list[tuple[str, Image.Image, Image.Image]] = []
    for name, image, labels in samples:
        height, width = labels.shape
        counts += torch.bincount(labels.flatten(), minlength=256)
        size = (_SHEET_WIDTH, max(1, round(_SHEET_WIDTH * height / width)))
        small = image_picture(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
        colored = palette_image(labels, palette).resize(size, Image.Resampling.NEAREST).convert("RGB")
        cells.append((f"{name}   {width}x{height}", small, colored))
    shares = 100 * counts[: len(names)].double() / counts[: len(names)].sum().clamp(min=1)
    order = shares.argsort(descending=True, stable=True).tolist()
    entries = [f"{names[index]} {float(shares[index]):.2g} %" if shares[index] else f"{names[index]} -" for index in order]
    sheet_width = 2 * 2 * (_SHEET_WIDTH + gap) + gap
    legend = _legend_lines(
        [*entries, "void"], [*(palette[index] for index in order), void_color(palette)], sheet_width - 2 * gap, font
    )
    lines = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    heights = [line + gap + max(small.height for _, small, _ in cells_of_line) for cells_of_line in lines]
    canvas = Image.new("RGB", (sheet_width, sum(heights) + line * len(legend) + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = 0
    for cells_of_line, height in zip(lines, heights, strict=True):
        for column, (title, small, colored) in enumerate(cells_of_line):
            left = gap + column * 2 * (_SHEET_WIDTH + gap)
            draw.text((left, top + 4), title, fill=_INK, font=font)
            canvas.paste(small, (left, top + line))
            canvas.paste(colored, (left + _SHEET_WIDTH + gap, top + line))
        top += height
    _draw_legend(draw, legend, gap, top, font)
    return canvas


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    legend: Sequence[Sequence[tuple[int, str, tuple[int, int, int]]]],
    gap: int,
    top: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    for entries in legend:
        for left, name, color in entries:
            draw.rectangle((gap + left, top + 4, gap + left + 14, top + 18), fill=color, outline=_INK)
            draw.text((gap + left + 20, top + 2), name, fill=_INK, font=font)
        top += _FONT_SIZE + 9


def _legend_lines(
    names: Sequence[str], colors: Palette, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """Break the legend into lines of (left edge, name, colour) that fit the width."""
    lines: list[list[tuple[int, str, tuple[int, int, int]]]] = [[]]
    left = 0
    for name, color in zip(names, colors, strict=True):
        needed = 20 + round(font.getlength(name)) + 18
        if left and left + needed > width:
            lines.append([])
            left = 0
        lines[-1].append((left, name, color))
        left += needed
    return lines


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture under a temporary name and rename it, so that no half-written file is left behind."""
    _atomically(path, lambda temporary: picture.save(temporary))


def pack(folder: Path, archive: Path) -> Path:
    """Pack all files below ``folder`` into ``archive`` (.zip or .tar.gz), named by their paths in it; return its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def write(temporary: Path) -> None:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(temporary, "w") as packed:  # PNGs do not get smaller
                for path in files:
                    packed.write(path, path.relative_to(folder))
        else:
            with tarfile.open(temporary, "w:gz") as packed_tar:
                for path in files:
                    packed_tar.add(path, path.relative_to(folder).as_posix())

    _atomically(archive, write)
    return archive


def save_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw training loss, mIoU and IoU per class over the epochs; more than 30 classes go without a legend.

    Args:
        history: one mapping per epoch: ``epoch`` and the logged ``train/loss``, ``val/miou``, ``val/iou/<class>``.
        path: the PNG.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, history, "train/loss", color="black")
    left.set(xlabel="epoch", ylabel="training loss", title="objective")
    keys = sorted({key for row in history for key in row if key.startswith("val/iou/")})
    for index, key in enumerate(keys):
        _curve(right, history, key, color=colormaps["gist_rainbow"](index / max(1, len(keys) - 1)), linewidth=1)
    _curve(right, history, "val/miou", color="black", linewidth=2.5)
    right.set(xlabel="epoch", ylabel="IoU", ylim=(0, 1), title="validation")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(keys) > _LEGEND_CLASSES:
        right.set(title=f"validation: mIoU and {len(keys)} classes")
    elif right.lines:
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))


def _curve(axes: "object", history: Sequence[Mapping[str, float]], key: str, **style: object) -> None:
    points = [(row["epoch"], row[key]) for row in history if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=key.removeprefix("val/iou/").removeprefix("val/"), **style)  # type: ignore[attr-defined]


def save_class_shares(
    names: Sequence[str], share: Tensor, foreground: Tensor, background: Tensor, path: Path, palette: Palette
) -> None:
    """Draw pixel shares (C,) and margin offsets (C,) of the classes, most frequent first."""
    from matplotlib.figure import Figure

    order = share.argsort(descending=True).tolist()
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [names[index] for index in order]
    colors = [tuple(channel / 255 for channel in palette[index]) for index in order]
    percent = [100 * float(share[index]) for index in order]
    left.barh(labels, percent, color=colors, edgecolor="black", linewidth=0.5)
    left.set(xlabel="share of the labelled training pixels in %", xscale="log")
    left.invert_yaxis()
    positions = np.arange(len(order))
    right.barh(positions - 0.2, background[order].numpy(), 0.4, label="background", color="tab:blue")
    right.barh(positions + 0.2, foreground[order].numpy(), 0.4, label="foreground", color="tab:orange")
    right.set(xlabel="margin offset in logits", xscale="log")
    right.legend()
    _atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
