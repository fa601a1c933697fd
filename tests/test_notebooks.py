"""The notebooks run, their results agree with their text, and the committed files are small."""

import math
import re
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of Jupyter, in this process


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook, stream="stdout"):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream" and output.name == stream)


def table(notebook, heading):
    """Parse the table below the line that ends with `heading`: numbers by row name."""
    lines = iter(printed(notebook).splitlines())
    assert any(line.endswith(heading) for line in lines)  # advances to the heading
    rows = {}
    for line in lines:
        match = re.fullmatch(r"(\S.*?)\s{2,}([-+.\de ]+)", line)
        if not match:
            break
        rows[match[1]] = [float(number) for number in match[2].split()]
    return rows


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Return a function that executes a notebook by name, once."""
    done = {}

    def run(name):
        if name not in done:
            path = next(path for path in NOTEBOOKS if path.stem == name)
            notebook, folder = nbformat.read(path, as_version=4), tmp_path_factory.mktemp(name)
            client = NotebookClient(
                notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", "1")  # threads on a busy machine take five times as long
                client.execute()
            done[name] = notebook
        return done[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_notebook_runs(name, executed):
    notebook = executed(name)
    assert "mIoU" in printed(notebook)
    assert "Warning" not in printed(notebook, "stderr")
    assert len(pictures(notebook)) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_small_and_has_outputs(path):
    assert path.stat().st_size < 400_000
    notebook = nbformat.read(path, as_version=4)
    assert len(pictures(notebook)) >= 2
    assert "mIoU" in printed(notebook)
    assert not printed(notebook, "stderr")
    assert not re.search(r"(?m)(?:^|[\"' (=])(/[a-z]+){2}", printed(notebook))  # paths of a machine


COUNTS = (980_000, 20_000)
DISTANCE = 2.5


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def miou(threshold):
    """Compute the mIoU in % of two normal distributions separated at `threshold`."""
    recall, false_alarms = 1 - NormalDist(DISTANCE).cdf(threshold), 1 - NormalDist().cdf(threshold)
    rare = 0.02 * recall / (0.02 + 0.98 * false_alarms)
    common = 0.98 * (1 - false_alarms) / (0.98 + 0.02 * (1 - recall))
    return 50 * (rare + common)


def test_objectives_slopes_at_the_boundary(executed):
    """Expected slopes of one pixel's loss, from the papers' formulas for two classes."""
    common, rare = COUNTS
    total = common + rare
    background = [10 * math.sqrt(total - n) / n for n in COUNTS]
    foreground = [
        b * (n / total) * math.sqrt(n) / ((total - n) - (n / total) * math.sqrt(total - n))
        for b, n in zip(background, COUNTS, strict=True)
    ]
    adjusted = math.log(common / rare)
    expected = {
        "cross entropy": (0.5, 0.5),
        "weighted cross entropy": (0.5 * 0.5 / 0.02, 0.5 * 0.5 / 0.98),
        "focal": ((math.log(2) + 0.5) * 0.25, (math.log(2) + 0.5) * 0.25),
        "LDAM": (sigmoid(0.5), sigmoid(0.5 * (rare / common) ** 0.25)),
        "logit adjustment": (sigmoid(adjusted), sigmoid(-adjusted)),
        "margin calibration": (
            (2 * sigmoid(foreground[1]) + sigmoid(background[0])) / 2,
            (2 * sigmoid(foreground[0]) + sigmoid(background[1])) / 2,
        ),
        "1 - p": (0.25, 0.25),
    }
    rows = table(executed("objectives"), "balance at P(rare)")
    assert rows.keys() == expected.keys()
    for name, (pull_up, pull_down) in expected.items():
        assert rows[name] == pytest.approx([pull_up, pull_down, pull_down / (pull_up + pull_down)], abs=6e-4), name


def test_objectives_thresholds_agree_with_the_text(executed):
    rows = table(executed("objectives"), "mIoU %")
    assert len(rows) == 13
    for name, (threshold, probability, recall, precision, iou, mean) in rows.items():
        odds = 0.02 * NormalDist(DISTANCE).pdf(threshold) / (0.98 * NormalDist().pdf(threshold))
        assert probability == pytest.approx(odds / (1 + odds), abs=2e-3), name
        assert iou == pytest.approx(100 / (100 / recall + 100 / precision - 1), abs=0.02), name
        assert mean == pytest.approx(miou(threshold), abs=0.4), name  # 10,000 pixels approximate the distributions
    best = rows.pop("best mIoU (search)")[-1]
    assert best == pytest.approx(max(miou(step / 100) for step in range(500)), abs=0.2)
    assert all(row[-1] <= best for row in rows.values())
    # Optima of pixel accuracy and of mean recall
    even, accurate = DISTANCE / 2, DISTANCE / 2 + math.log(49) / DISTANCE
    for name, threshold in {
        "cross entropy": accurate,
        "focal": accurate,
        "weighted cross entropy": even,
        "logit adjustment": even,
    }.items():
        assert rows[name][0] == pytest.approx(threshold, abs=0.02), name
    near = {"IoU weights", "Dice", "Jaccard", "Lovász"}
    assert all((row[-1] > best - 0.5) == (name in near) for name, row in rows.items())
    # Larger background margins of the rare class make its predictions rarer
    cautious = [rows[name][0] for name in ("cross entropy", "margin calibration", "margin calibration, tau 100")]
    assert cautious == sorted(cautious)


def test_offsets_agree_with_the_formulas(executed):
    rows = table(
        executed("objectives"), "ijcv2022: background            foreground      miou: background            foreground"
    )
    pixels = [row[0] for row in rows.values()]
    assert pixels == sorted(pixels, reverse=True)
    total = sum(pixels)
    largest = max((total - n) ** 0.25 * n**-0.5 for n in pixels)
    for name, (n, *offsets) in rows.items():
        others, share = total - n, n / total
        background = 10 * math.sqrt(others) / n
        foreground = background * share * math.sqrt(n) / (others - share * math.sqrt(others))
        expected = [background, foreground, others**0.25 * n**-0.5 / largest, n**-0.25 / largest]
        assert offsets == pytest.approx(expected, rel=6e-3), name


def test_training_comparison(executed):
    rows = table(executed("objectives"), "light")  # the last column, as classes are sorted by pixels
    assert len(rows) == 5
    for name, (mean, tail, *iou) in rows.items():
        assert len(iou) == 8, name
        assert all(0 <= value <= 100 for value in iou), name
        assert mean == pytest.approx(fmean(iou), abs=0.011), name
        assert tail == pytest.approx(fmean(iou[-3:]), abs=0.011), name
        assert iou[0] > 60, name  # has learned; predicting only road gives 51
    assert rows["logit adjustment"][1] > 0  # rare classes are predicted


def test_study_prints_scores_of_the_stored_counts(executed):
    rows = re.findall(r"(?m)^(\S.*?)\s{2,}(\d)\s+([\d.]+) ± ([\d.]+) ", printed(executed("study")))
    assert len(rows) == 2 * 14
    for regime, table in (("scratch", rows[:14]), ("finetune", rows[14:])):
        runs = pd.read_csv(NOTEBOOKS[0].parents[1] / "benchmarks" / "study" / f"{regime}.csv.xz")
        runs = runs[(runs.role == "final") & ~runs.shifted]
        scores = {}
        for (objective, _), counts in runs.groupby(["objective", "seed"]):
            hit, labelled, predicted = (counts.filter(like=f"{part}/").sum() for part in ("correct", "target", "predicted"))
            iou = [h / (n + p - h) for h, n, p in zip(hit, labelled, predicted, strict=True)]
            scores.setdefault(objective, []).append(100 * fmean(iou))
        assert {name for name, *_ in table} == scores.keys()
        for name, seeds, mean, deviation in table:
            assert int(seeds) == len(scores[name]) == 3
            assert float(mean) == pytest.approx(fmean(scores[name]), abs=0.006), name
            assert float(deviation) == pytest.approx(stdev(scores[name]), abs=0.006), name
    assert (rows[0][0], rows[14][0]) == ("power dice (ours)", "dice")
