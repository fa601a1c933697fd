"""What `mcseg` does besides Lightning's verbs: download, show, bound, stats, check, compare."""

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
from mcseg.run.cli import SegmentationCLI


def download(args: Sequence[str]) -> None:
    """``mcseg download``: fetch a benchmark's archives, or say which to get and where."""
    from mcseg.data.download import download as fetch

    parser = ArgumentParser(prog="mcseg download", exit_on_error=False)
    parser.add_argument("name", help=f"one of {', '.join(benchmark_names())}")
    parser.add_argument("--root", required=True, help="folder that is to hold the data")
    parser.add_argument("--keep_archives", type=bool, default=False, help="keep the archives once they are unpacked")
    settings = parser.parse_args(list(args))
    fetch(
        settings.name,
        benchmark_facts(settings.name),
        Path(settings.root).expanduser(),
        keep_archives=settings.keep_archives,
    )


def show(recipe: str, args: Sequence[str]) -> None:
    """``mcseg show``: a contact sheet of images and labels spread evenly over a split."""
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
    """Image and labels; all void where the labels are not public."""
    if split in data.withheld:
        image = data.reader.image(sample)
        return image, torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)
    return data.reader.pair(sample)


class BoundCLI(SegmentationCLI):
    """Validation or test with the bounds that it gives for unseen images; in one process, as they need every image."""

    verb = "bound"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the bounds' own settings."""
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(HeldOutBounds, "bound")

    def before_instantiate_classes(self) -> None:
        """Take one device, unless the user chose."""
        super().before_instantiate_classes()
        if self.verb_config.trainer.devices in ("auto", -1):
            self.verb_config.trainer.devices = 1


def bound(recipe: str, args: Sequence[str]) -> None:
    """``mcseg bound``: mIoU of a held-out split, what it promises for unseen images, and how far the margins reach."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--split", choices=("val", "test"), default="val")
    chosen, rest = options.parse_known_args(args)
    BoundCLI(recipe, ["validate" if chosen.split == "val" else "test", *rest])


def stats(recipe: str, args: Sequence[str]) -> None:
    """``mcseg stats``: count the training labels; print and draw shares, and what the objective derives from them."""
    config, data = _data(recipe, args)
    pixels = data.class_pixels()
    share = pixels.double() / pixels.sum()
    constants = _class_constants(config.model.objective, pixels)
    titles = [name.replace("_", " ") for name in constants]
    width = max(len("class"), *map(len, data.class_names))
    print(f"{'class':<{width}}  {'pixels':>14}  {'share %':>8}" + "".join(f"  {title:>17}" for title in titles))
    for index in share.argsort(descending=True).tolist():
        own = "".join(
            f"  {float(values[index]):>{max(17, len(title))}.4g}"
            for title, values in zip(titles, constants.values(), strict=True)
        )
        print(f"{data.class_names[index]:<{width}}  {int(pixels[index]):>14,}  {100 * float(share[index]):>8.3f}{own}")
    from mcseg.pictures import save_class_shares

    path = Path(config.trainer.default_root_dir or Path("runs") / recipe) / "class_shares.png"
    save_class_shares(data.class_names, share, dict(zip(titles, constants.values(), strict=True)), path, data.palette)
    print(f"picture: {path}")


def check(recipe: str, args: Sequence[str]) -> None:
    """``mcseg check``: open every file; exit with 1 where anything is wrong."""
    from mcseg.data.check import check as check_data

    _, data = _data(recipe, args)
    report = check_data(data)
    for split, images in report.images.items():
        print(f"{split}: {images} images, {int(report.pixels[split].sum()):,} labelled pixels")
    for problem in report.problems:
        print(f"problem: {problem}")
    if report.problems:
        print(f"{len(report.problems)} problems found")
        raise SystemExit(1)
    print("no problems found")


def compare(recipe: str, args: Sequence[str]) -> None:
    """``mcseg compare``: objectives x seeds on one data recipe, with tables and a report."""
    from mcseg.compare.command import command

    command(recipe, args)


def _data(recipe: str, args: Sequence[str], **options: Any) -> tuple[Namespace, SegmentationData]:
    """Parse as for a run, with the verb's own options and their defaults, then make the data module alone."""

    class DataOnly(SegmentationCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            for name, default in options.items():
                parser.add_argument(f"--{name}", type=type(default), default=default)

        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

    config = DataOnly(recipe, args, run=False).config
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationData, "data")
    return config, parser.instantiate_classes(parser.parse_object({"data": config.data.as_dict()})).data


def _class_constants(settings: Namespace | None, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the configured objective derives from the counts, ``(C,)`` each by name; nothing where it needs none."""
    if settings is None:
        return {}
    found = settings.as_dict()
    if "num_classes" in inspect.signature(pkgutil.resolve_name(found["class_path"])).parameters:
        found["init_args"] = {**(found.get("init_args") or {}), "num_classes": len(pixels)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "objective")
    objective = parser.instantiate_classes(parser.parse_object({"objective": found})).objective
    if (calibrate := offered(objective, "calibrate")) is not None:
        calibrate(pixels)
    return dict(offered(objective, "class_constants"))
