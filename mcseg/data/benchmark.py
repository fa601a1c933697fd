"""Public benchmarks in their official layouts: ``facts/<name>.toml`` describes each, and one class reads all."""

import itertools
import json
import os
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mcseg.benchmarks import benchmark_names, facts_file
from mcseg.data.classlist import table_from_toml
from mcseg.data.datamodule import SegmentationData
from mcseg.data.files import Sample
from mcseg.data.labels import DataError, LabelTable
from mcseg.data.layout import fill, find, fixed_folder, readable
from mcseg.data.matlab import MatReader

_FILES = ("images", "masks", "list")  # keys of a source whose values are path templates
_REQUIRED = ("title", "homepage", "license", "splits", "labels")
_REQUIRED_TO_DOWNLOAD = ("login", "archives", "tree")  # in the optional table `download`


@cache
def benchmark_facts(name: str) -> dict[str, Any]:
    """Read ``facts/<name>.toml``. Raises DataError for an unknown name or a missing key."""
    if name not in benchmark_names():
        raise DataError(f"found the benchmark {name}, expected one of {', '.join(benchmark_names())}")
    facts = tomllib.loads(facts_file(name).read_text(encoding="utf-8"))
    missing = [key for key in _REQUIRED if key not in facts]
    if "download" in facts:
        missing += [f"download.{key}" for key in _REQUIRED_TO_DOWNLOAD if key not in facts["download"]]
    if missing:
        raise DataError(f"{facts_file(name)}: has no {', '.join(missing)}; add it, see CONTRIBUTING.md")
    return facts


@dataclass(frozen=True)
class Submission:
    """File format of a benchmark's evaluation server, which `~mcseg.callbacks.PredictionWriter` writes.

    Args:
        benchmark: Name of the benchmark.
        file: Path of a label map in the archive, with ``{name}`` for the sample's name.
        archive: ``zip`` or ``tar.gz``.
        values: (C,) value of each train id in the label map.
        palette: Write palette PNGs in the class colours instead of grey PNGs.
    """

    benchmark: str
    file: str
    archive: str
    values: tuple[int, ...]
    palette: bool


class Listing(NamedTuple):
    """Samples of a split, sorted by name, and remarks about skipped files."""

    samples: list[Sample]
    remarks: list[str]


class BenchmarkData(SegmentationData):
    """A benchmark in its official layout.

    The facts give the files of a split as path templates, for example those of CamVid::

        [splits.train]
        count = 367  # images in the official split
        from = [{ images = "train/{id}.png", masks = "trainannot/{id}.png" }]

    An image and its mask have the same ``{fields}``: ``train/0001TP_006690.png`` and ``trainannot/0001TP_006690.png``.

    Args:
        name: Name of the benchmark, see ``mcseg.benchmarks.benchmark_names``.
        root: Folder into which the archives were unpacked, or one of its subfolders down to the data set's own folder.
        labels: Name of the label set; only for a benchmark with several.
        table: Label table to use instead of the one in the facts.
        **options: See `~mcseg.data.datamodule.SegmentationData`.

    Raises:
        DataError: The benchmark or the label set is unknown.
    """

    def __init__(
        self,
        name: str,
        root: str | os.PathLike[str] | None = None,
        *,
        labels: str | None = None,
        table: LabelTable | None = None,
        **options: Any,
    ) -> None:
        self.benchmark = name
        self.facts = benchmark_facts(name)
        self.labels = labels
        sets: dict[str, Any] = self.facts["labels"]
        # Empty for a benchmark with one label set, which has no name.
        choices = [key for key, value in sets.items() if isinstance(value, dict)]
        if choices:
            check_choice("labels", labels, choices)
        elif labels is not None:
            raise DataError(f"data.labels: found {labels}, but {name} has only one label set; remove the setting")
        self.label_facts: dict[str, Any] = sets[labels] if labels is not None else sets
        super().__init__(table or table_from_toml(self.label_facts, f"{name}.toml", void=()), root, **options)
        self.reader = MatReader(self.reader.table, images=self.images)
        self.official = {split: facts.get("count") for split, facts in self.facts["splits"].items()}
        self._listings: dict[str, Listing] = {}  # by split

    @property
    def submission(self) -> Submission | None:
        """File format of the evaluation server; None if there is no server."""
        facts = self.facts.get("submission")
        if facts is None:
            return None
        raw = {train: value for value, train in self.reader.table.raw_ids.items()}
        values = tuple(raw[train] for train in range(self.num_classes))
        return Submission(
            benchmark=self.benchmark,
            file=facts["file"],
            archive=facts["archive"],
            values=values,
            palette=facts.get("palette", False),
        )

    @property
    def withheld(self) -> tuple[str, ...]:
        """Splits whose labels are not public."""
        return tuple(
            split
            for split, facts in self.facts["splits"].items()
            if facts.get("from") and not any("masks" in source for source in facts["from"])
        )

    @property
    def home(self) -> Path:
        """Folder that the paths in the facts are relative to: the root or a folder below it.

        Raises:
            DataError: ``root`` is not given, or contains no file of the data set.
        """
        if self.root is None:
            raise DataError(f"data.root is not set: {self.expected()}")
        # The root may include some of the archives' top folders.
        parts = Path(self.facts.get("layout", {}).get("home", "")).parts
        for skipped in range(len(parts) + 1):
            home = self.root.joinpath(*parts[skipped:])
            if any(_exists(home, source) for split in self.facts["splits"].values() for source in split.get("from", ())):
                return home
        problem = f"no {self.facts['title']} in this folder" if self.root.is_dir() else "no such folder"
        raise DataError(f"{self.root}: {problem}; {self.expected()}")

    @property
    def recipe(self) -> str:
        """Name of the packaged recipe, which is the benchmark's."""
        return self.benchmark

    def samples(self, split: str) -> list[Sample]:
        """List the images of a split, sorted by name; ``mask`` is None if the labels are not public."""
        return self.listed(split)

    def remarks(self, split: str) -> list[str]:
        """List differences from the official split: a different number of images, images or masks without a counterpart."""
        samples, official = self.samples(split), self.official.get(split)
        remarks = list(self._listings[split].remarks) if split in self._listings else []
        if samples and official and len(samples) != official:
            remarks.append(
                f"{self.facts['title']}: found {len(samples)} images in the {split} split, the official one has {official}; "
                "check that all archives were unpacked completely"
            )
        return remarks

    def expected(self, split: str = "train") -> str:
        """Describe the files that a split needs and how to get them, for messages."""
        home = self.facts.get("layout", {}).get("home", "")
        source = self.facts["splits"][split if split in self.facts["splits"] else "all"]["from"][0]
        files = [os.path.normpath(os.path.join(home, readable(source[key]))) for key in _FILES if key in source]
        listing = f"{', '.join(files[:-1])}{' and ' if files[1:] else ''}{files[-1]}"
        return f"expected {listing} below the root; {self._download_hint()}"

    def listed(self, split: str, home: Path | None = None, **fields: str) -> list[Sample]:
        """List a split as the facts describe it.

        Args:
            split: Key of ``splits`` in the facts.
            home: Folder that the paths in the facts are relative to; the default is ``self.home``.
            **fields: Values for some fields of the path templates.

        Raises:
            DataError: There are images but no masks, or the train or val split has no images.
        """
        if split not in self._listings:
            self._listings[split] = self._find_listing(self.facts["splits"].get(split, {}), home, fields)
            if not self._listings[split].samples and split in ("train", "val"):
                raise DataError(f"{self.root}: the {split} split of {self.facts['title']} is empty; {self.expected(split)}")
        return self._listings[split].samples

    def _find_listing(self, facts: dict[str, Any], home: Path | None, fields: dict[str, str]) -> Listing:
        folder = home or self.home
        sources = [
            {key: _fill_fields(value, fields) for key, value in source.items()}
            for source in facts.get("from", ())
            if source.get("labels", self.labels) == self.labels
        ]
        # A benchmark may have had several layouts over time; use the first complete one.
        present = [source for source in sources if _exists(folder, source)]
        for source in present:
            if "masks" not in source or next(find(folder, source["masks"]), None):
                return self._pair_files(folder, source, skip=facts.get("skip", ()))
        if present:
            masks = present[0]["masks"]
            raise DataError(
                f"{fixed_folder(folder, masks)}: no masks of {self.facts['title']}; expected {readable(masks)}; "
                f"{self._download_hint()}"
            )
        return Listing([], [])

    def _pair_files(self, folder: Path, source: dict[str, str], *, skip: Iterable[str]) -> Listing:
        """Pair the images of a source with their masks."""
        layout = self.facts.get("layout", {})
        name, masks = layout.get("name", "{id}"), source.get("masks")
        images = {name.format_map(fields): (fields, path) for fields, path in _images(folder, source)}
        names = [key for key in sorted(images) if key not in set(skip)]
        samples = [Sample(key, images[key][1], fill(folder, masks, images[key][0]) if masks else None) for key in names]
        if not masks or not layout.get("leave_out_orphans"):
            return Listing(samples, [])
        partners = {name.format_map(fields): path for fields, path in find(folder, masks)}
        remarks = [
            f"{self.facts['title']}: skipped {len(orphans)} {kind}: {', '.join(orphans[:6])}"
            f"{', ...' if len(orphans) > 6 else ''}"
            for kind, orphans in (
                ("images without a mask", [key for key in names if key not in partners]),
                ("masks without an image", sorted(key for key in partners if key not in images)),
            )
            if orphans
        ]
        return Listing([sample for sample in samples if sample.name in partners], remarks)

    def _download_hint(self) -> str:
        if "download" not in self.facts:
            return f"see {self.facts['homepage']}"
        effect = "explains how to get them" if self.facts["download"]["login"] else "downloads them"
        return f"`mcseg download {self.benchmark} --root DIR` {effect}"


def check_choice(option: str, value: str | None, choices: Collection[str]) -> None:
    """Raise DataError if the value of a data option is not one of its choices."""
    if value not in choices:
        raise DataError(f"data.{option}: found {value}, expected one of {', '.join(choices)}")


def _fill_fields(value: str, fields: dict[str, str]) -> str:
    for name, text in fields.items():
        value = value.replace(f"{{{name}}}", text)
    return value


def _exists(folder: Path, source: dict[str, str]) -> bool:
    """Whether a source's list of images, or else one of its images, exists."""
    if "list" in source:
        return (folder / source["list"]).is_file()
    return next(find(folder, source["images"]), None) is not None


def _images(folder: Path, source: dict[str, str]) -> list[tuple[dict[str, str], Path]]:
    """List the images of a source as (fields, path)."""
    if "list" not in source:
        return list(find(folder, source["images"]))
    lines = (folder / source["list"]).read_text(encoding="utf-8").split("\n")
    # Lists have one id per line; older lists of VOC have two columns of paths.
    ids = [Path(line.split()[0]).stem for line in lines if line.strip()]
    return [({"id": id_}, fill(folder, source["images"], {"id": id_})) for id_ in ids]


class CamVidData(BenchmarkData):
    """CamVid in the layout of the SegNet tutorial: 367 / 101 / 233 images of 480x360, 11 classes, void 11.

    Source: Brostow et al., ECCV 2008; 11-class version of Badrinarayanan, Kendall, Cipolla (SegNet).

    Args:
        root: Folder with ``train``, ``trainannot``, ``val``, ``valannot`` and, optionally, ``test``, ``testannot``. Images
            may be .png or .jpg.
        **options: See `~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__("camvid", root, **options)


class CityscapesData(BenchmarkData):
    """Cityscapes: 2975 / 500 / 1525 images of 2048x1024 with fine labels, 19 classes.

    Source: Cordts et al., CVPR 2016.

    Args:
        root: Folder with ``leftImg8bit`` and ``gtFine``, and ``gtCoarse`` for ``coarse``.
        coarse: Also train on the 19997 coarsely labelled images of ``train_extra``.
        **options: See `~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, *, coarse: bool = False, **options: Any) -> None:
        super().__init__("cityscapes", root, **options)
        self.coarse = coarse
        if coarse:
            self.official["train"] += self.official["train_extra"]

    def samples(self, split: str) -> list[Sample]:
        """List the images of a split; with ``coarse``, the training split includes ``train_extra``."""
        if split != "train" or not self.coarse:
            return super().samples(split)
        extra = self.listed("train_extra")
        if not extra:
            raise DataError(f"{self.root}: data.coarse is set but train_extra is empty; {self.expected('train_extra')}")
        return sorted(super().samples("train") + extra, key=lambda sample: sample.name)


class BDD100KData(BenchmarkData):
    """BDD100K semantic segmentation: 7000 / 1000 / 2000 images of 1280x720, the 19 classes of Cityscapes.

    Images and masks are paired by name. Packages from before June 2021 contain images or masks without a counterpart, which
    are skipped with a warning. Source: Yu et al., CVPR 2020.

    Args:
        root: Folder with ``bdd100k``, or that folder itself; the layout from before June 2021 (``seg``) is also
            supported.
        **options: See `~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__("bdd100k", root, **options)


class MapillaryVistasData(BenchmarkData):
    """Mapillary Vistas: 18000 / 2000 / 5000 images, some above 20 megapixels; 65 (v1.2) or 116 (v2.0) classes.

    If the distribution's ``config`` file exists, its label names must equal those in the facts. Source: Neuhold et al.,
    ICCV 2017.

    Args:
        root: Folder with ``training``, ``validation`` and ``testing``, in the nested layout of the v2.0 archive or the flat
            layout of v1.x.
        version: Version of the labels.
        **options: See `~mcseg.data.datamodule.SegmentationData`; ``max_side`` limits memory and time.
    """

    def __init__(
        self, root: str | os.PathLike[str] | None = None, *, version: Literal["v1.2", "v2.0"] = "v1.2", **options: Any
    ) -> None:
        check_choice("version", version, benchmark_facts("mapillary_vistas")["labels"])
        super().__init__("mapillary_vistas", root, labels=version, **options)

    def samples(self, split: str) -> list[Sample]:
        """List the images of a split. Raises DataError if the config file has labels different from the facts."""
        candidates = [self.home / f"config_{self.labels}.json"]
        if self.labels == "v1.2":
            candidates.append(self.home / "config.json")  # name in the v1.x archives
        for path in candidates:
            if path.is_file():
                self._verify_config(path)
        return super().samples(split)

    def _verify_config(self, path: Path) -> None:
        try:
            config_names = [label["name"] for label in json.loads(path.read_text(encoding="utf-8"))["labels"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); expected the config file of Mapillary Vistas; unpack the archive again"
            ) from None
        pairs = itertools.zip_longest(config_names, self.label_facts["config"], fillvalue="missing")
        for index, (name, expected) in enumerate(pairs):
            if name != expected:
                raise DataError(
                    f"{path}: label {index} is {name}, expected {expected} of {self.labels}; the masks may contain "
                    "other labels; set data.version or download the archive again"
                )


class SceneParse150Data(BenchmarkData):
    """MIT SceneParse150 (ADE20K, scene parsing challenge 2016): 20210 / 2000 images and the test images; 150 classes.

    Source: Zhou et al., CVPR 2017.

    Args:
        root: Folder with ``ADEChallengeData2016`` and, optionally, ``release_test``; or ``ADEChallengeData2016`` itself.
        **options: See `~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__("sceneparse150", root, **options)


class CocoStuff10kData(BenchmarkData):
    """COCO-Stuff 10k v1.1: 9000 training and 1000 validation images (the public test list), 171 classes.

    Source: Caesar, Uijlings, Ferrari, CVPR 2018.

    Args:
        root: Folder with ``images``, ``annotations`` and ``imageLists``.
        **options: See `~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__("cocostuff10k", root, **options)


class PascalVOCData(BenchmarkData):
    """PASCAL VOC 2012: 1464 (or 10582) / 1449 / 1456 images, 20 classes and background.

    Source: Everingham et al., IJCV 2015; Hariharan et al., ICCV 2011 (SBD).

    Args:
        root: Folder with ``VOCdevkit`` (and ``benchmark_RELEASE`` for ``train_aug``), or its subfolder ``VOC2012``.
        train_set: ``train``, or ``train_aug``: the images of VOC train, SBD train and SBD val that are not in VOC val. An
            image with a mask of VOC and one of SBD gets the mask of VOC.
        **options: See `~mcseg.data.datamodule.SegmentationData`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        train_set: Literal["train", "train_aug"] = "train",
        **options: Any,
    ) -> None:
        super().__init__("pascal_voc", root, **options)
        check_choice("train_set", train_set, ("train", "train_aug"))
        self.train_set = train_set
        self.official["train"] = self.official[train_set]

    def samples(self, split: str) -> list[Sample]:
        """List the images of a split; ``train_set`` selects the training images."""
        voc = super().samples(split)
        if split != "train" or self.train_set == "train":
            return voc
        sbd: dict[str, Sample] = {}
        for part in ("sbd_train", "sbd_val"):
            sbd |= {sample.name: sample for sample in self.listed(part)}
            if not self.listed(part):
                raise DataError(f"{self.root}: data.train_set is train_aug but SBD is missing; {self.expected(part)}")
        val_names = {sample.name for sample in super().samples("val")}
        union = sbd | {sample.name: sample for sample in voc}
        return [union[name] for name in sorted(union) if name not in val_names]
