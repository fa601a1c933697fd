"""Print what the trials of a study found on its folds, in Markdown: of each fold's near and far images.

python benchmarks/study/folds.py runs/study/ablation --near '0016E5_*'
"""

import argparse
import fnmatch
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from mcseg.compare.statistics import measures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--near", default="0016E5_*", help="glob pattern of the images that are near the training ones")
    arguments = parser.parse_args()
    found: dict[tuple[str, float, str], dict[int, tuple[list[float], list[float], list[float]]]] = defaultdict(dict)
    for path in sorted(arguments.folder.glob("runs/*/result.json")):
        result = json.loads(path.read_text())
        if result["role"] != "fold":
            continue
        with np.load(path.with_name("counts.npz")) as saved:
            counts, names = saved["counts"], saved["names"]
        near = np.array([fnmatch.fnmatch(name, arguments.near) for name in names])
        tail = result["classes"]["tail"]
        model = result["settings"]["model"]
        rate = model["optimizer"]["init_args"]["lr"]
        # by the settings: a trial's number is that of the study in which it ran first
        chosen = json.dumps(model["objective"]["init_args"], sort_keys=True)
        key = (result["objective"], rate, chosen)
        found[key][result["fold"]] = tuple(
            list(100 * measures(counts[part].sum(0), tail)) for part in (near | True, near, ~near)
        )  # type: ignore[assignment]
    folds = sorted({fold for by_fold in found.values() for fold in by_fold})
    print("mIoU / rarest third / pixel accuracy in %: all images of a fold, its near ones, its far ones\n")
    several = {key[0] for key in found if len({k[2] for k in found if k[0] == key[0]}) > 1}
    print(
        "| objective | lr | settings | " + " | ".join(f"fold {fold}: all | near | far" for fold in folds) + " | mean mIoU |"
    )
    print("|---|---:|---|" + "---:|" * (3 * len(folds) + 1))
    for key, by_fold in sorted(found.items()):
        cells = []
        for fold in folds:
            cells += [" / ".join(f"{value:.1f}" for value in part) for part in by_fold.get(fold, ([], [], []))]
        whole = len(by_fold) == len(folds)
        mean = f"{np.mean([parts[0][0] for parts in by_fold.values()]):.2f}" if whole else "-"
        shown = f"`{key[2]}`" if key[0] in several else ""
        print(f"| {key[0]} | {key[1]} | {shown} | " + " | ".join(cells) + f" | {mean} |")


if __name__ == "__main__":
    main()
