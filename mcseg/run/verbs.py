"""The verbs of ``mcseg`` that are not Lightning's: download, show, bound, stats, check, compare.

Each function takes the name of the recipe and the arguments that `~mcseg.run.recipes.find_recipes` returns, without the
verb. ``download`` takes only arguments.
"""

import argparse
import inspect
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.cli import LightningArgumentParser
from torch import nn

from mcseg.benchmarks import benchmark_names
from mcseg.callbacks.held_out import HeldOutBounds
from mcseg.data import IGNORE_INDEX, DataError, SegmentationData
from mcseg.data.benchmark import benchmark_facts
from mcseg.data.datamodule import SPLITS
from mcseg.data.files import Sample
from mcseg.losses import offered
from mcseg.run.cli import ParseOnlyCLI, SegmentationCLI


def download(args: Sequence[str]) -> None:
    """Fetch a benchmark's archives, or print which archives to get and where."""
    from mcseg.data.download import download as fetch

    parser = ArgumentParser(prog="mcseg download", exit_on_error=False)
    parser.add_argument("name", help=f"one of {', '.join(benchmark_names())}")
    parser.add_argument("--root", required=True, help="folder for the data")
    parser.add_argument("--keep_archives", type=bool, default=False, help="keep the archives after unpacking")
    settings = parser.parse_args(list(args))
    fetch(
        settings.name,
        benchmark_facts(settings.name),
        Path(settings.root).expanduser(),
        keep_archives=settings.keep_archives,
    )


def show(recipe: str, args: Sequence[str]) -> None:
    """Draw a contact sheet of images and labels spread evenly over a split."""
    from mcseg import pictures

    config, data = _data(recipe, args, images=12, split="train")
    if config.split not in SPLITS or config.images < 1:
        raise ValueError(
            f"found --split {config.split} and --images {config.images}; expected {', '.join(SPLITS)}, and at least 1 image"
        )
    for remark in data.remarks(config.split):
        print(remark)
    samples = data.samples(config.split)
    if not samples:
        raise DataError(f"the {config.split} split of {data.root} is empty; choose another --split")
    count = min(config.images, len(samples))
    chosen = [samples[index * len(samples) // count] for index in range(count)]
    sheet = pictures.contact_sheet(
        ((sample.name, *_shown(data, sample, config.split)) for sample in chosen), data.class_names, data.palette
    )
    path = Path(config.trainer.default_root_dir or Path("runs") / recipe) / f"{config.split}.png"
    pictures.save(sheet, path)
    print(f"{count} of {len(samples)} images of the {config.split} split: {path}")


def _shown(data: SegmentationData, sample: Sample, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image and labels; all labels void if the split's labels are not public."""
    if split in data.withheld:
        image = data.reader.image(sample)
        labels = torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)
    else:
        image, labels = data.reader.pair(sample)
    return image[[band - 1 for band in data.show_bands]], labels


class BoundCLI(SegmentationCLI):
    """Validation or test with bounds for unseen images; on one device, as the bounds need all images in one process."""

    verb = "bound"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of the bounds."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(HeldOutBounds, "bound")

    def before_instantiate_classes(self) -> None:
        """Set one device, unless the user chose another number."""
        super().before_instantiate_classes()
        if self.verb_config.trainer.devices in ("auto", -1):
            self.verb_config.trainer.devices = 1


def bound(recipe: str, args: Sequence[str]) -> None:
    """Compute mIoU of a held-out split, its lower bounds for unseen images, and the margins of the pixels."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--split", choices=("val", "test"), default="val")
    chosen, rest = options.parse_known_args(args)
    BoundCLI(recipe, ["validate" if chosen.split == "val" else "test", *rest])


def stats(recipe: str, args: Sequence[str]) -> None:
    """Print pixels per class, the objective's class constants, and mean and deviation per band; draw the class shares."""
    config, data = _data(recipe, args)
    pixels = data.class_pixels()
    share = pixels.double() / pixels.sum()
    constants = {name.replace("_", " "): values for name, values in _class_constants(config.model.objective, pixels).items()}
    width = max(len("class"), *map(len, data.class_names))
    print(f"{'class':<{width}}  {'pixels':>14}  {'share %':>8}" + "".join(f"  {title:>17}" for title in constants))
    for index in share.argsort(descending=True).tolist():
        derived = "".join(f"  {float(values[index]):>{max(17, len(title))}.4g}" for title, values in constants.items())
        print(f"{data.class_names[index]:<{width}}  {int(pixels[index]):>14,}  {100 * float(share[index]):>8.3f}{derived}")
    mean, std = data.band_statistics()
    print(f"\n{'band':<{width}}  {'mean':>14}  {'deviation':>9}  (of values in 0..1)")
    for number, (average, deviation) in enumerate(zip(mean.tolist(), std.tolist(), strict=True), 1):
        print(f"{number:<{width}}  {average:>14.4f}  {deviation:>9.4f}")
    from mcseg.pictures import save_class_shares

    path = Path(config.trainer.default_root_dir or Path("runs") / recipe) / "class_shares.png"
    save_class_shares(data.class_names, share, constants, path=path, palette=data.palette)
    print(f"picture: {path}")


def check(recipe: str, args: Sequence[str]) -> None:
    """Open every file of the data and print all problems; exit with 1 if there is one."""
    from mcseg.data.check import check as check_data

    _, data = _data(recipe, args)
    report = check_data(data)
    for line in data.layout():
        print(line)
    for split, images in report.images.items():
        print(
            f"{split}: {images} {'image' if images == 1 else 'images'}, {int(report.pixels[split].sum()):,} labelled pixels"
        )
    for problem in report.problems:
        print(f"problem: {problem}")
    for warning in report.warnings:
        print(f"warning: {warning}")
    if report.problems:
        number = len(report.problems)
        print(f"{number} {'problem' if number == 1 else 'problems'} found")
        raise SystemExit(1)
    print("no problems found")


def compare(recipe: str, args: Sequence[str]) -> None:
    """Train objectives with several seeds on one data recipe; write tables and a report."""
    from mcseg.compare.command import command

    command(recipe, args)


def _data(recipe: str, args: Sequence[str], **options: Any) -> tuple[Namespace, SegmentationData]:
    """Parse as for a run and create only the data module.

    Args:
        recipe: Name of the recipe.
        args: Arguments without the verb.
        **options: Additional options of the verb, with their defaults.

    Returns:
        The settings and the data module.
    """

    class DataCLI(ParseOnlyCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            for name, default in options.items():
                parser.add_argument(f"--{name}", type=type(default), default=default)

    config = DataCLI(recipe, args, run=False).config
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationData, "data")
    return config, parser.instantiate_classes(parser.parse_object({"data": config.data.as_dict()})).data


def _class_constants(settings: Namespace | None, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the class constants of the configured objective after calibration, (C,) each by name; may be empty."""
    if settings is None:
        return {}
    specification = settings.as_dict()
    if "num_classes" in inspect.signature(pkgutil.resolve_name(specification["class_path"])).parameters:
        specification["init_args"] = {**(specification.get("init_args") or {}), "num_classes": len(pixels)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "objective")
    objective = parser.instantiate_classes(parser.parse_object({"objective": specification})).objective
    if (calibrate := offered(objective, "calibrate")) is not None:
        calibrate(pixels)
    return dict(offered(objective, "class_constants"))
