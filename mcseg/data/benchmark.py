"""Public benchmarks: what is known of each stands in a TOML file beside this one; one class reads them all."""

import os
import tomllib
from importlib import resources
from typing import Any

from mcseg.data.classlist import table_from_toml
from mcseg.data.datamodule import SegmentationData, image_files
from mcseg.data.files import Sample
from mcseg.data.labels import DataError


class BenchmarkData(SegmentationData):
    """A benchmark in its official layout.

    Args:
        facts: name of the TOML file (without its ending) that describes layout and labels.
        root: folder that holds the layout.
        **options: see :class:`~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(self, facts: str, root: str | os.PathLike[str] | None = None, **options: Any) -> None:
        text = resources.files("mcseg.data").joinpath(f"{facts}.toml").read_text(encoding="utf-8")
        self.facts = tomllib.loads(text)
        super().__init__(table_from_toml(self.facts["labels"], f"{facts}.toml"), root, **options)

    def samples(self, split: str) -> list[Sample]:
        """List the images of a split with their masks; empty where the folder of the split is missing."""
        layout = self.facts["layout"]
        tree = f"expected the folders {', '.join(layout[kind].format(split='<split>') for kind in ('images', 'masks'))}"
        if self.root is None:
            raise DataError(f"data.root is not set: {tree} of {self.facts['title']} in it ({self.facts['homepage']})")
        if not any((self.root / layout["images"].format(split=known)).is_dir() for known in layout["splits"]):
            raise DataError(
                f"{self.root}: no {self.facts['title']} here, {tree} with <split> one of "
                f"{', '.join(layout['splits'])}; see {self.facts['homepage']}"
            )
        images, masks = (self.root / layout[kind].format(split=split) for kind in ("images", "masks"))
        if not images.is_dir():
            return []
        return [Sample(path.stem, path, masks / f"{path.stem}.png") for path in image_files(images)]


class CamVidData(BenchmarkData):
    """CamVid in the layout of the SegNet tutorial: 367 / 101 / 233 images of 480x360, 11 classes, void 11.

    Source: Brostow et al., ECCV 2008; 11-class version of Badrinarayanan, Kendall, Cipolla (SegNet).

    Args:
        root: folder with ``train``, ``trainannot``, ``val``, ``valannot`` and, if there, ``test``, ``testannot``. Images
            may be .png or .jpg.
        **options: see :class:`~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__("camvid", root, **options)
