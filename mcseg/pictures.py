"""Draw and save pictures: palette PNGs, overlays, panels with a legend, confusion matrices, curves, bars per class."""

import functools
import gc
import math
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mcseg.atomic import write_atomically
from mcseg.palette import Color, Palette, void_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Arguments = ParamSpec("_Arguments")

_BACKGROUND, _INK, _GRID_LINE = (255, 255, 255), (40, 40, 40), (205, 205, 205)
_SHEET_WIDTH = 300  # width in pixels of an image in a contact sheet
_COLUMN_WIDTH = 360  # width in pixels to which the images of a panel are resized
_BAR_WIDTH = 240  # length in pixels of the bar of the largest value
_FONT_SIZE = 15
_PERCENTILE_PIXELS = 100_000
LEGEND_CLASSES = 30  # a legend of more classes takes more space than the pictures


def as_array(picture: Image.Image) -> NDArray[np.uint8]:
    """Return a picture as an RGB array (H,W,3) uint8."""
    return np.asarray(picture.convert("RGB"))


def palette_image(mask: Tensor, palette: Palette) -> Image.Image:
    """Turn train ids (H,W), 0..C-1 and void 255, into a palette image whose pixel values are the ids."""
    picture = Image.fromarray(mask.to(torch.uint8).numpy()).convert("P")
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    colors[255] = void_color(palette)
    picture.putpalette(colors.tobytes())
    return picture


def save_tiff_mask(mask: Tensor, palette: Palette, tags: Mapping[int, tuple[int, int, Any]], path: Path) -> None:
    """Write train ids (H,W) uint8 as a TIFF palette file with tags of its image, such as its georeference.

    Args:
        mask: Train ids, 0..C-1 and void 255; the pixel values of the file.
        palette: RGB colour of each class.
        tags: Code of a tag -> its type in TIFF, number of values and value.
        path: The file.
    """
    import tifffile  # at first use, as few runs need it

    colors = np.array(palette_image(mask[:1, :1], palette).getpalette("RGB"), dtype=np.uint16).reshape(256, 3)

    def write(temporary: Path) -> None:
        tifffile.imwrite(
            temporary,
            mask.to(torch.uint8).numpy(),
            photometric="palette",
            colormap=257 * colors.T,
            tile=(512, 512) if max(mask.shape) > 4096 else None,
            compression="zlib",
            metadata=None,
            software="mcseg",
            extratags=[(code, kind, count, value, True) for code, (kind, count, value) in tags.items()],
        )

    write_atomically(path, write)


def grey_image(values: Tensor) -> Image.Image:
    """Turn values (H,W) uint8 into an 8-bit grey image."""
    return Image.fromarray(values.numpy())


def image_picture(image: Tensor) -> Image.Image:
    """Turn an image into an RGB picture.

    Args:
        image: (3,H,W) RGB or (1,H,W) grey. uint8 is shown as it is; each band of floating point is stretched from its 2nd
            to its 98th percentile, because the values of a photo of 12 bits or of reflectances fill a small part of [0, 1].
    """
    if image.is_floating_point():
        image = torch.stack([_stretched(band) for band in image.float()])
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _stretched(band: Tensor) -> Tensor:
    """Map the 2nd to the 98th percentile of (H,W) to 0..255, uint8."""
    step = max(1, math.isqrt(band.numel() // _PERCENTILE_PIXELS))  # a grid of pixels is enough
    low, high = np.percentile(band[::step, ::step].numpy(), (2, 98))
    stretched: Tensor = (band - float(low)) * (255 / max(float(high - low), 1e-6))
    return stretched.round_().clamp_(0, 255).to(torch.uint8)


def overlay(image: Tensor, mask: Tensor, palette: Palette, opacity: float = 0.35) -> Image.Image:
    """Blend the coloured mask over the image.

    Args:
        image: (3,h,w) or (1,h,w), see `image_picture`; resized to the size of the mask.
        mask: (H,W) train ids, 0..C-1 and void 255.
        palette: RGB colour of each class.
        opacity: weight of the mask's colour, 0 to 1.

    Returns:
        An RGB picture of the size of the mask.
    """
    colored = palette_image(mask, palette).convert("RGB")
    resized = image_picture(image).resize(colored.size, Image.Resampling.BILINEAR)
    return Image.blend(resized, colored, opacity)


def panel(rows: Sequence[tuple[Tensor, Tensor, Tensor]], names: Sequence[str], palette: Palette) -> Image.Image:
    """Draw images, targets and predictions side by side, with headings and a legend of the classes.

    Void pixels of the target are drawn as void in the prediction too, because they are not scored. If there are more than
    30 classes, the legend shows only the classes that occur in the pictures.

    Args:
        rows: image (3,h,w) or (1,h,w), target (H,W) and prediction (H,W) of each row; both label maps hold train ids,
            0..C-1 and void 255.
        names: class names.
        palette: RGB colour of each class.

    Returns:
        An RGB picture.
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
                _resized(image_picture(image), size),
                *(
                    palette_image(mask, palette).resize(size, Image.Resampling.NEAREST).convert("RGB")
                    for mask in (target, scored)
                ),
            ]
        )
    width = 3 * _COLUMN_WIDTH + 4 * gap
    shown = list(range(len(names)))
    labels = torch.cat([mask.flatten() for _, target, preds in rows for mask in (target, preds)])
    present = torch.bincount(labels, minlength=256) > 0
    if len(names) > LEGEND_CLASSES:
        shown = [index for index in shown if present[index]]
    entries = [(names[index], palette[index]) for index in shown]
    if present[255]:
        entries.append(("void", void_color(palette)))
    legend = _legend_lines(entries, width=width - 2 * gap, font=font)
    height = line + sum(row[0].height + gap for row in pictures) + line * len(legend) + gap
    canvas = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(("image", "target", "prediction")):
        draw.text((gap + column * (_COLUMN_WIDTH + gap), 4), heading, fill=_INK, font=font)
    top = line
    for row in pictures:
        for column, picture in enumerate(row):
            canvas.paste(picture, (gap + column * (_COLUMN_WIDTH + gap), top))
        top += row[0].height + gap
    _draw_legend(draw, legend, left=gap, top=top, font=font)
    return canvas


def contact_sheet(samples: Iterable[tuple[str, Tensor, Tensor]], names: Sequence[str], palette: Palette) -> Image.Image:
    """Draw images beside their coloured labels, two samples per line, above a legend of the classes.

    The legend gives each class's share of the labelled pixels and starts with the most frequent class.

    Args:
        samples: name, image (3,H,W) or (1,H,W) and labels (H,W) of each sample; labels hold train ids, 0..C-1 and void 255.
            The samples are read one at a time and only small copies are kept, so an iterator saves memory.
        names: class names.
        palette: RGB colour of each class.

    Returns:
        An RGB picture.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    gap, line = 8, _FONT_SIZE + 9
    counts = torch.zeros(256, dtype=torch.int64)
    cells: list[tuple[str, Image.Image, Image.Image]] = []
    for name, image, labels in samples:
        height, width = labels.shape
        counts += torch.bincount(labels.flatten(), minlength=256)
        size = (_SHEET_WIDTH, max(1, round(_SHEET_WIDTH * height / width)))
        small = _resized(image_picture(image), size)
        colored = palette_image(labels, palette).resize(size, Image.Resampling.NEAREST).convert("RGB")
        cells.append((f"{name}   {width}x{height}", small, colored))
    shares = 100 * counts[: len(names)].double() / counts[: len(names)].sum().clamp(min=1)
    order = shares.argsort(descending=True, stable=True).tolist()
    entries = [(f"{names[index]} {_percent(float(shares[index]))}", palette[index]) for index in order]
    if counts[255]:
        entries.append(("void", void_color(palette)))
    sheet_width = 2 * 2 * (_SHEET_WIDTH + gap) + gap
    legend = _legend_lines(entries, width=sheet_width - 2 * gap, font=font)
    lines = [cells[start : start + 2] for start in range(0, len(cells), 2)]
    heights = [line + gap + max(small.height for _, small, _ in cells_of_line) for cells_of_line in lines]
    canvas = Image.new("RGB", (sheet_width, sum(heights) + line * len(legend) + gap), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    top = 0
    for cells_of_line, height in zip(lines, heights, strict=True):
        for column, (title, small, colored) in enumerate(cells_of_line):
            left = gap + column * 2 * (_SHEET_WIDTH + gap)
            draw.text((left, top + 4), title, fill=_INK, font=font)
            canvas.paste(small, (left, top + line))
            canvas.paste(colored, (left + _SHEET_WIDTH + gap, top + line))
        top += height
    _draw_legend(draw, legend, left=gap, top=top, font=font)
    return canvas


def _percent(value: float) -> str:
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture to (width, height); a smaller picture keeps its pixels visible."""
    if size[0] > picture.width:
        return picture.resize(size, Image.Resampling.NEAREST)
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2)


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    legend: Sequence[Sequence[tuple[int, str, Color]]],
    *,
    left: int,
    top: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    for entries in legend:
        for shift, name, color in entries:
            draw.rectangle((left + shift, top + 4, left + shift + 14, top + 18), fill=color, outline=_INK)
            draw.text((left + shift + 20, top + 2), name, fill=_INK, font=font)
        top += _FONT_SIZE + 9


def _legend_lines(
    entries: Sequence[tuple[str, Color]], *, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> list[list[tuple[int, str, Color]]]:
    """Break the legend into lines of (left edge, name, colour) that fit into ``width`` pixels."""
    lines: list[list[tuple[int, str, Color]]] = [[]]
    left = 0
    for name, color in entries:
        needed = 20 + round(font.getlength(name)) + 18
        if left and left + needed > width:
            lines.append([])
            left = 0
        lines[-1].append((left, name, color))
        left += needed
    return lines


def confusion_picture(confusion: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix in percent of the pixels of each target class, so that the diagonal shows the recall.

    With up to 30 classes, each cell shows its percentage, rounded, unless that is 0. The row of a class without target
    pixels is grey. The shade of a cell is proportional to the square root of the share, so that small shares are visible.

    Args:
        confusion: (C,C) pixel counts; rows are targets, columns are predictions.
        names: class names.

    Returns:
        An RGB picture.
    """
    counts = confusion.double().cpu().numpy()
    pixels = counts.sum(1, keepdims=True)
    shares = np.divide(counts, pixels, out=np.zeros_like(counts), where=pixels > 0)
    classes = len(names)
    cell = 38 if classes <= LEGEND_CLASSES else 16 if classes <= 80 else 12
    font = ImageFont.load_default(min(_FONT_SIZE, cell - 2))
    number, text = ImageFont.load_default(_FONT_SIZE - 2), ImageFont.load_default(_FONT_SIZE)
    margin, side = 8, classes * cell
    label = round(max(map(font.getlength, names))) + 2 * margin
    # A large matrix is easier to read with the class names on all four sides.
    far_side = label if classes > LEGEND_CLASSES else margin
    left, top = label, _FONT_SIZE + 2 * margin + label
    title = "target (rows) predicted as (columns), % of the target's pixels"
    width = max(left + side + far_side, round(text.getlength(title)) + 2 * margin)
    canvas = Image.new("RGB", (width, top + side + far_side + _FONT_SIZE + 2 * margin), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), title, fill=_INK, font=text)
    colors = _shade(shares)
    colors[pixels[:, 0] == 0] = 225
    matrix = Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST)
    canvas.paste(matrix, (left, top))
    for index, name in enumerate(names):
        middle = index * cell + cell // 2
        upright = Image.new("RGB", (label, cell), _BACKGROUND)
        ImageDraw.Draw(upright).text((margin, cell // 2), name, fill=_INK, font=font, anchor="lm")
        canvas.paste(upright.transpose(Image.Transpose.ROTATE_90), (left + index * cell, top - label))
        draw.text((left - margin, top + middle), name, fill=_INK, font=font, anchor="rm")
        if far_side == label:
            draw.text((left + side + margin, top + middle), name, fill=_INK, font=font, anchor="lm")
            below = Image.new("RGB", (label, cell), _BACKGROUND)
            ImageDraw.Draw(below).text((label - margin, cell // 2), name, fill=_INK, font=font, anchor="rm")
            canvas.paste(below.transpose(Image.Transpose.ROTATE_90), (left + index * cell, top + side))
    grid_step = 1 if classes <= LEGEND_CLASSES else 5
    for index in [*range(0, classes, grid_step), classes]:
        draw.line((left + index * cell, top, left + index * cell, top + side), fill=_GRID_LINE)
        draw.line((left, top + index * cell, left + side, top + index * cell), fill=_GRID_LINE)
    if classes <= LEGEND_CLASSES:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            center = (left + column * cell + cell // 2, top + row * cell + cell // 2)
            ink = _BACKGROUND if shares[row, column] > 0.3 else _INK
            draw.text(center, f"{100 * shares[row, column]:.0f}", fill=ink, font=number, anchor="mm")
    _draw_scale(draw, left=margin, top=top + side + far_side + margin, font=number)
    return canvas


def class_values_picture(values: Mapping[str, Tensor], names: Sequence[str], palette: Palette) -> Image.Image:
    """Draw one row per class and one column per quantity; each cell shows its value as a bar and as a number.

    Args:
        values: title of each column -> (C,) values of any sign. Each column has its own scale, on which the bars start at
            0. A NaN has no bar and is written as "-".
        names: class names.
        palette: RGB colour of each class.

    Returns:
        An RGB picture.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    gap, line = 8, _FONT_SIZE + 6
    label = round(max(map(font.getlength, names))) + 2 * gap
    number = round(font.getlength("-0.00e-00")) + 2 * gap
    column = max(_BAR_WIDTH + number, *(round(font.getlength(name)) for name in values)) + 2 * gap
    canvas = Image.new("RGB", (label + column * len(values), line * (len(names) + 1) + 2 * gap), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(names, 1):
        draw.text((label - gap, gap + row * line + line // 2), name, fill=_INK, font=font, anchor="rm")
    for index, (title, column_values) in enumerate(values.items()):
        numbers = column_values.double().cpu()
        known = numbers[~numbers.isnan()].tolist()
        low, high = min([0.0, *known]), max([0.0, *known])
        scale = _BAR_WIDTH / ((high - low) or 1.0)
        left = label + index * column
        zero = left - round(low * scale)
        draw.text((left, gap + line // 2), title, fill=_INK, font=font, anchor="lm")
        draw.line((zero, gap + line, zero, gap + line * (len(names) + 1)), fill=_INK)
        for row, (value, color) in enumerate(zip(numbers.tolist(), palette, strict=True), 1):
            top = gap + row * line
            if not math.isnan(value) and value:
                start, end = sorted((zero, zero + round(value * scale)))
                draw.rectangle((start, top + 2, end, top + line - 3), fill=color, outline=_INK)
            text = "-" if math.isnan(value) else f"{value:.3g}"
            draw.text((left + _BAR_WIDTH + number, top + line // 2), text, fill=_INK, font=font, anchor="rm")
    return canvas


def _shade(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Map shares in [0, 1] to RGB colours (..., 3) uint8 from white to dark blue."""
    dark = np.array([8, 48, 107])
    return (255 + (dark - 255) * np.sqrt(shares)[..., None]).round().astype(np.uint8)


def _draw_scale(
    draw: ImageDraw.ImageDraw, *, left: int, top: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> None:
    for percent in (0, 1, 5, 20, 50, 100):
        color = tuple(_shade(np.array(percent / 100)).tolist())
        draw.rectangle((left, top, left + 14, top + 14), fill=color, outline=_INK)
        draw.text((left + 19, top + 7), f"{percent} %", fill=_INK, font=font, anchor="lm")
        left += 19 + round(font.getlength(f"{percent} %")) + 10


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture under a temporary name and rename it, so that no half-written file is left behind."""
    write_atomically(path, lambda temporary: picture.save(temporary))


def pack(folder: Path, archive: Path) -> Path:
    """Pack all files of a folder and its subfolders into an archive.

    Args:
        folder: folder to pack; the entries of the archive have paths relative to it.
        archive: path of the archive; ``.zip`` writes an uncompressed ZIP file, any other ending a ``.tar.gz`` file.

    Returns:
        ``archive``.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def write(temporary: Path) -> None:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(temporary, "w") as packed:  # uncompressed: compression does not make PNGs smaller
                for path in files:
                    packed.write(path, path.relative_to(folder))
        else:
            with tarfile.open(temporary, "w:gz") as packed_tar:
                for path in files:
                    packed_tar.add(path, path.relative_to(folder).as_posix())

    write_atomically(archive, write)
    return archive


def _freeing_figures(draw: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Decorate a function that draws with matplotlib: free the memory of its figures when it returns.

    A figure consists of thousands of objects in reference cycles. Python collects them only once a quarter of all objects
    is new, so that in a long run memory would grow by about 40 MiB first.
    """

    @functools.wraps(draw)
    def wrapper(*args: _Arguments.args, **options: _Arguments.kwargs) -> None:
        freeze = not gc.get_freeze_count()  # the user's own frozen objects stay frozen
        if freeze:
            gc.freeze()  # so that the collection below visits only the objects of the figure, not the whole process
        try:
            draw(*args, **options)
        finally:
            gc.collect()
            if freeze:
                gc.unfreeze()

    return wrapper


@_freeing_figures
def save_curves(history: Sequence[Mapping[str, float]], path: Path, names: Sequence[str], palette: Palette) -> None:
    """Draw training loss, mIoU and IoU per class over the epochs and save the figure; no legend above 30 classes.

    Args:
        history: one mapping per epoch with ``epoch`` and the logged ``train/loss``, ``val/miou``, ``val/iou/<class>``.
        path: image file to write, for example a PNG.
        names: class names in the order of the legend.
        palette: RGB colour of each class.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import Normal, Stroke

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curve(left, history, "train/loss", color="black")
    left.set(xlabel="epoch", ylabel="loss", title="training")
    outline = [Stroke(linewidth=2.5, foreground="0.4"), Normal()]  # for colours that are close to white
    for name, color in zip(names, palette, strict=True):
        style = {"color": tuple(channel / 255 for channel in color), "path_effects": outline}
        _curve(right, history, f"val/iou/{name}", scale=100, label=name, linewidth=1.5, **style)
    _curve(right, history, "val/miou", scale=100, label="mIoU", color="black", linewidth=2.5, linestyle="--")
    right.set(xlabel="epoch", ylabel="IoU in %", ylim=(0, 100), title="validation")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(names) > LEGEND_CLASSES:
        right.set(title=f"validation: mIoU and {len(names)} classes")
    elif right.lines:
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))


def _curve(axes: "Axes", history: Sequence[Mapping[str, float]], key: str, scale: float = 1, **style: Any) -> None:
    points = [(row["epoch"], scale * row[key]) for row in history if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def save_class_shares(
    names: Sequence[str], share: Tensor, constants: Mapping[str, Tensor], path: Path, palette: Palette
) -> None:
    """Draw the pixel share of each class, most frequent first, and the objective's class constants; save the figure.

    Args:
        names: class names.
        share: (C,) share of the labelled pixels, 0 to 1.
        constants: name -> (C,) values of the objective, drawn beside the shares; may be empty.
        path: image file to write, for example a PNG.
        palette: RGB colour of each class.
    """
    from matplotlib.figure import Figure

    order = share.argsort(descending=True).tolist()
    figure = Figure(figsize=(11 if constants else 6, 1.2 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2 if constants else 1, sharey=True, squeeze=False)[0]
    labels = [names[index] for index in order]
    colors = [tuple(channel / 255 for channel in palette[index]) for index in order]
    percent = [100 * float(share[index]) for index in order]
    axes[0].barh(labels, percent, color=colors, edgecolor="black", linewidth=0.5)
    positive = [value for value in percent if value > 0]
    lowest = 10.0 ** math.floor(math.log10(min(positive, default=1.0) / 2))  # below the shortest bar
    axes[0].set(xlabel="share of the labelled training pixels in %", xscale="log", xlim=(lowest, 100))
    axes[0].xaxis.set_major_formatter("{x:g}")
    for row, value in enumerate(percent):
        axes[0].text(1.01, row, _percent(value), va="center", transform=axes[0].get_yaxis_transform())
    axes[0].invert_yaxis()
    if constants:
        positions, height = np.arange(len(order)), 0.8 / len(constants)
        for index, (name, values) in enumerate(constants.items()):
            shift = (index - (len(constants) - 1) / 2) * height
            axes[1].barh(positions + shift, values[order].numpy(), height, label=name)
        logarithmic = all(bool((values >= 0).all()) for values in constants.values())
        axes[1].set(xlabel="constants of the objective", xscale="log" if logarithmic else "linear")
        axes[1].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)  # above, where no bar is
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
