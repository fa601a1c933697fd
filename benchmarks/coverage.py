"""Measure how often the held-out bounds of mIoU hold, over random simulated worlds with a known mIoU.

A world is a source of images. It has 2 to 21 classes. Their shares of an image span three orders of magnitude, and the
rarest class occurs in one of 7 to 1000 images. Object sizes have heavy tails. Recall depends on the class, the image (hard
images are hard for all classes), the object and its size; missed pixels become false alarms of a few other classes. The
world's mIoU is computed from 100,000 images. Held-out sets of several sizes are drawn from the world and bounded. Two more
sources cover hard cases: images of two sizes, and a class in few images.

python benchmarks/coverage.py                                       # 500 worlds, writes benchmarks/results/coverage.md
python benchmarks/coverage.py --worlds 20 --images 50 --output ""
"""

import argparse
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from mcseg.evaluation.bounds import Weight, miou_lower_bound

PIXELS = 100_000  # per image
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Bound = Callable[[Counts, float], float]


@dataclass(frozen=True)
class World:
    """Source of images, given by the parameters of its distribution; arrays have shape (C,)."""

    share: Floats
    presence: Floats
    skill: Floats
    tail: float
    noise: float
    common: float
    depth: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "World":
        """Draw the parameters at random."""
        classes = int(rng.integers(2, 22))
        rarest = rng.uniform(-7, -2)
        presence = np.exp(rng.uniform(rarest, np.log(2), classes)).clip(max=1)
        presence[0] = 1  # no image is empty
        return cls(
            share=np.sort(np.exp(rng.uniform(np.log(1e-3), 0, classes)))[::-1],
            presence=presence,
            skill=rng.normal(rng.uniform(0, 3), 1, classes),
            tail=rng.uniform(0.3, 1.3),
            noise=rng.uniform(0.3, 3),
            common=rng.uniform(0, 1.5),
            depth=rng.uniform(0, 1),
        )

    def images(self, number: int, rng: np.random.Generator) -> Counts:
        """Draw images: hit, target and predicted pixels (number, 3, C)."""
        shape = (number, len(self.share))
        present = rng.random(shape) < self.presence
        target = np.exp(self.tail * rng.standard_normal(shape)) * self.share * present
        target /= target.sum(1, keepdims=True)
        ease = self.skill + self.common * rng.standard_normal((number, 1)) + self.noise * rng.standard_normal(shape)
        hits = target / (1 + np.exp(-ease - self.depth * np.log(target / self.share + 1e-3)))
        # Few classes, mostly present ones, receive most of an image's missed pixels; none more than fit.
        affinity = rng.gamma(0.3, 1, shape) * self.share * (0.3 * self.presence + present) + 1e-30
        alarms = (target - hits).sum(1, keepdims=True) * affinity / affinity.sum(1, keepdims=True)
        counts = np.stack([hits, target, hits + np.minimum(alarms, 1 - target)], 1)
        rounded: Counts = np.rint(counts * PIXELS).astype(np.int64)
        hits, target, predicted = rounded.transpose(1, 0, 2)
        np.minimum(predicted, target.sum(1, keepdims=True) - target + hits, out=predicted)  # rounding can exceed the room
        return rounded

    def iou(self, rng: np.random.Generator, number: int) -> Floats:
        """Return IoU (C,) over ``number`` images."""
        return iou_of(sum(self.images(number // 10, rng).sum(0) for _ in range(10)))


def iou_of(counts: npt.ArrayLike) -> Floats:
    """Return IoU (..., C) of summed counts (..., 3, C); NaN for a class that does not occur."""
    hits, target, predicted = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    union = target + predicted - hits
    iou: Floats = np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)
    return iou


@dataclass(frozen=True)
class TwoSizes:
    """Source of two classes: 98 % small images, segmented well, and 2 % images with 80 times the pixels, segmented badly.

    A set often has no large image, although large images have most of the source's pixels.
    """

    small: int = 100_000
    factor = np.array([1, 80])
    chance = np.array([0.98, 0.02])
    recall = np.array([0.9, 0.1])

    @property
    def largest(self) -> int:
        """Pixels of a large image."""
        return self.small * int(self.factor[1])

    def images(self, number: int, rng: np.random.Generator) -> Counts:
        """Draw images: hit, target and predicted pixels (number, 3, 2); each class has half of an image."""
        size = rng.choice(2, number, p=self.chance)
        target = np.repeat(self.small * self.factor[size] // 2, 2).reshape(number, 2)
        hits = rng.binomial(target, (self.recall[size] + rng.uniform(-0.1, 0.1, number))[:, None])
        return np.stack([hits, target, hits + (target - hits)[:, ::-1]], 1)

    def miou(self, weight: Weight) -> float:
        """Return the exact mIoU of the source; both classes have the same IoU."""
        weights = self.chance * (self.factor if weight == "pixel" else 1)
        recall = float((weights * self.recall).sum() / weights.sum())
        return recall / (2 - recall)


@dataclass(frozen=True)
class RareClass:
    """Source of a common class and a rare one. An image has the rare class with a given chance, in a fiftieth of its pixels.

    The recall of the rare class is near 0 or near 1 in most images; missed pixels become false alarms of the common class.
    """

    chance: float

    def images(self, number: int, rng: np.random.Generator) -> Counts:
        """Draw images: hit, target and predicted pixels (number, 3, 2)."""
        rare = PIXELS // 50 * (rng.random(number) < self.chance)
        hit = rng.binomial(rare, rng.beta(0.5, 0.5, number))
        return np.stack([[PIXELS - rare, hit], [PIXELS - rare, rare], [PIXELS - hit, hit]]).transpose(2, 0, 1)

    def miou(self) -> float:
        """Return the exact mIoU of the source."""
        rare = self.chance / 50
        return ((1 - rare) / (1 - rare / 2) + 1 / 2) / 2


def resampled(counts: Counts, resamples: int = 2000) -> Floats:
    """Return the sorted mIoUs of bootstrap resamples of the images."""
    images = len(counts)
    times = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), resamples)
    sums = times.astype(np.float64) @ counts.reshape(images, -1)
    mious: Floats = np.sort(np.nanmean(iou_of(sums.reshape(resamples, *counts.shape[1:])), axis=1))
    return mious


def percentile(counts: Counts, level: float) -> float:
    """Return the bound of the textbook percentile interval, for comparison."""
    return float(np.quantile(resampled(counts), 1 - level))


def bca(counts: Counts, level: float) -> float:
    """Return the bound of the textbook bias-corrected and accelerated interval, for comparison."""
    mious, miou = resampled(counts), float(np.nanmean(iou_of(counts.sum(0))))
    left_out = np.nanmean(iou_of(counts.sum(0) - counts), axis=1)
    skewed = left_out.mean() - left_out
    acceleration = (skewed**3).sum() / max(6 * (skewed**2).sum() ** 1.5, 1e-30)
    below = ((mious < miou).mean() + (mious <= miou).mean()) / 2
    bias = norm.ppf(np.clip(below, 1e-4, 1 - 1e-4))
    z = bias + norm.ppf(1 - level)
    return float(np.quantile(mious, norm.cdf(bias + z / (1 - acceleration * z))))


BOUNDS: dict[str, Bound] = {
    "bootstrap": lambda counts, level: miou_lower_bound(counts, level),
    "concentration": lambda counts, level: miou_lower_bound(counts, level, "concentration", largest_pixels=PIXELS + 50),
    "percentile bootstrap": percentile,
    "BCa bootstrap": bca,
}


LIMIT = TwoSizes().largest
OF_TWO_SIZES: dict[str, tuple[Weight, Bound]] = {
    "bootstrap": ("pixel", lambda counts, level: miou_lower_bound(counts, level)),
    "concentration, limit stated": (
        "pixel",
        lambda counts, level: miou_lower_bound(counts, level, "concentration", largest_pixels=LIMIT),
    ),
    "concentration, largest image of the set as the limit": (
        "pixel",
        lambda counts, level: miou_lower_bound(
            counts, level, "concentration", largest_pixels=int(counts[:, 1].sum(1).max())
        ),
    ),
    "bootstrap, equal images": ("image", lambda counts, level: miou_lower_bound(counts, level, weight="image")),
    "concentration, equal images": (
        "image",
        lambda counts, level: miou_lower_bound(counts, level, "concentration", weight="image"),
    ),
}


def simulate(
    worlds: int,
    sizes: Sequence[int],
    level: float,
    bounds: dict[str, Bound],
    seed: int = 0,
    truth_images: int = 100_000,
) -> dict[int, dict[str, Floats]]:
    """Bound one held-out set of each size from each world. The known mIoU is over the classes that occur in the set.

    Returns:
        For each size, arrays (worlds,): ``truth``, ``estimate``, ``rarest`` (effective number of images with the rarest
        class), and the bounds by name.
    """
    rows: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for index in range(worlds):
        rng = np.random.default_rng([seed, index])
        world = World.draw(rng)
        truth = world.iou(rng, truth_images)
        for size in sizes:
            counts = world.images(size, rng)
            iou = iou_of(counts.sum(0))
            occurs = ~np.isnan(iou)
            union = (counts[:, 1] + counts[:, 2] - counts[:, 0])[:, occurs].astype(np.float64)
            known = {"truth": truth[occurs].mean(), "estimate": iou[occurs].mean()}
            known["rarest"] = (union.sum(0) ** 2 / (union**2).sum(0)).min()
            rows[size].append(known | {name: bound(counts, level) for name, bound in bounds.items()})
    return {size: {key: np.array([row[key] for row in part]) for key in part[0]} for size, part in rows.items()}


def two_sizes(sets: int, sizes: Sequence[int], level: float) -> list[str]:
    """Bound sets of images of two sizes and return the rows of a table."""
    source, rows = TwoSizes(), []
    for images in sizes:
        rng = np.random.default_rng([images, 1])
        drawn = [source.images(images, rng) for _ in range(sets)]
        without = np.mean([counts[:, 1].sum(1).max() < source.largest for counts in drawn])
        for name, (weight, bound) in OF_TWO_SIZES.items():
            values = np.array([bound(counts, level) for counts in drawn])
            holds = 100 * (values <= source.miou(weight)).mean()
            rows.append(f"| {images} | {100 * without:.0f} | {name} | {holds:.1f} | {100 * values.mean():.1f} |")
    return rows


def rare_class(sets: int, images: int, level: float) -> list[str]:
    """Bound sets with a class in few images and return the rows of a table."""
    rows = []
    for expected in (4, 8, 15, 30, 60):
        source, rng = RareClass(expected / images), np.random.default_rng([expected, 2])
        drawn = [counts for counts in (source.images(images, rng) for _ in range(sets)) if counts[:, 1, 1].any()]
        values = np.array([miou_lower_bound(counts, level) for counts in drawn])
        estimate = np.array([iou_of(counts.sum(0)).mean() for counts in drawn])
        holds = 100 * (values <= source.miou()).mean()
        rows.append(f"| {expected} | {len(drawn)} | {holds:.1f} | {100 * (estimate - values).mean():.1f} |")
    return rows


def report(arguments: argparse.Namespace) -> str:
    """Run the simulations and return the report in Markdown."""
    rows = []
    simulated = simulate(arguments.worlds, arguments.images, arguments.level, BOUNDS)
    for images, result in simulated.items():
        rare = result["rarest"] < 3
        for name in BOUNDS:
            holds = result[name] <= result["truth"]
            parts = [f"{100 * holds[part].mean():.1f} ({part.sum()})" if part.any() else "-" for part in (rare, ~rare)]
            distance = 100 * (result["estimate"] - result[name]).mean()
            rows.append(f"| {images} | {name} | {100 * holds.mean():.1f} | {parts[0]} | {parts[1]} | {distance:.1f} |")
    miou = 100 * simulated[arguments.images[-1]]["truth"].mean()
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("mcseg", "numpy", "scipy"))
    return "\n".join(
        [
            f"# Lower bounds of mIoU at {100 * arguments.level:g} %: how often they hold",
            "",
            f"{arguments.worlds} worlds as described in `benchmarks/coverage.py` (mean mIoU {miou:.1f} %), one held-out",
            "set of each size per world. *Holds*: percentage of sets for which the world's mIoU is at least the bound; also",
            "for sets whose rarest class is in fewer than 3 images (effective number), with the number of sets in brackets.",
            "*Distance*: mean distance from the mIoU of the set down to the bound, in points of mIoU. `bootstrap` and",
            "`concentration` are the bounds of `mcseg bound`; the other two are textbook intervals. With 500 worlds, 95 %",
            "has a standard error of 1 point.",
            "",
            "| images | bound | holds % | a class in fewer than 3 images | no such class | distance |",
            "|---:|---|---:|---:|---:|---:|",
            *rows,
            "",
            "## Images of two sizes",
            "",
            f"98 % of the images have {TwoSizes().small:,} pixels and are segmented well; 2 % have {LIMIT:,} and are",
            f"segmented badly. The source's mIoU is {100 * TwoSizes().miou('pixel'):.1f} %, or with equal weight per image",
            f"{100 * TwoSizes().miou('image'):.1f} %. {arguments.worlds} sets of each size. *None*: percentage of sets",
            "without a large image; such a set alone says nothing about large images.",
            "",
            "| images | none | bound | holds % | mean of the bound |",
            "|---:|---:|---|---:|---:|",
            *two_sizes(arguments.worlds, [20, *arguments.images], arguments.level),
            "",
            "## A class in few images",
            "",
            f"The bootstrap on {arguments.images[-1]} images of a common class and a rare one with an IoU of 50 %.",
            "",
            "| images with the class, expected | sets | holds % | distance |",
            "|---:|---:|---:|---:|",
            *rare_class(arguments.worlds, arguments.images[-1], arguments.level),
            "",
            f"`python benchmarks/coverage.py --worlds {arguments.worlds} --images {' '.join(map(str, arguments.images))}`,",
            f"2 cores of an AMD EPYC; Python {platform.python_version()}, {packages}; commit {commit}.",
            "",
        ]
    )


def main() -> None:
    """Print the report and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=500)
    parser.add_argument("--images", type=int, nargs="+", default=[50, 100, 500])
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "coverage.md"), help='"" for none')
    arguments = parser.parse_args()
    text = report(arguments)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text)


if __name__ == "__main__":
    main()
