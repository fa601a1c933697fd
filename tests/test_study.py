"""Every number of the study's README, and those that README.md and the site quote, follow from the tables of its pixel counts."""

import importlib.util
import itertools
import re
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "benchmarks" / "study"
OURS = "power dice (ours)"
PARTS = ("correct", "target", "predicted")
TAIL = ["bicyclist", "pedestrian", "pole", "fence"]


def script():
    spec = importlib.util.spec_from_file_location("study_tables", STUDY / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study = script()


@pytest.fixture(scope="module")
def regimes():
    return {name: study.read(name) for name in ("scratch", "finetune", "ablation")}


@pytest.fixture(scope="module")
def compared(regimes):
    return {name: study.compared(name) for name in ("scratch", "finetune")}


@pytest.fixture(scope="module")
def sentences(regimes, compared):
    """Sentences of the README with the computed numbers, by subject."""
    return {source.__name__: list(source(regimes, compared)) for source in SOURCES}


@pytest.fixture(scope="module")
def printed():
    return study.all_tables()


# Scores by plain pandas, as an oracle for the scripts


def percent_iou(rows):
    """Return IoU in % by class, from the counts summed over the rows."""
    names = [name.partition("/")[2] for name in rows.columns if name.startswith("correct/")]
    correct, target, predicted = (rows[[f"{part}/{name}" for name in names]].sum().to_numpy() for part in PARTS)
    return pd.Series(100 * correct / (target + predicted - correct), names)


def finals(table, label, shifted=False):
    """Return the rows of an objective's final runs, one table per seed."""
    rows = table[(table.role == "final") & (table.objective == label) & (table.shifted == shifted)]
    return [rows[rows.seed == seed] for seed in sorted(rows.seed.unique())]


def class_means(table, label):
    """Return IoU in % by class, mean over seeds."""
    return pd.concat([percent_iou(rows) for rows in finals(table, label)], axis=1).mean(axis=1)


def miou(table, label, shifted=False):
    return statistics.fmean(percent_iou(rows).mean() for rows in finals(table, label, shifted))


def accuracy(rows):
    return 100 * rows.filter(like="correct/").to_numpy().sum() / rows.filter(like="target/").to_numpy().sum()


@pytest.mark.slow
def test_final_scores_equal_those_of_plain_pandas(regimes, compared):
    for regime, comparison in compared.items():
        assert comparison.tail == [comparison.class_names.index(name) for name in TAIL]
        rows = {(row["objective"], row["shifted"]): row for row in comparison.rows}
        assert len(rows) == 2 * 14
        for (label, shifted), row in rows.items():
            seeds = finals(regimes[regime], label, shifted)
            assert row["seeds"] == len(seeds) == 3
            iou = [percent_iou(rows_of_seed) for rows_of_seed in seeds]
            values = [
                (one.mean(), one[TAIL].mean(), accuracy(rows_of_seed)) for one, rows_of_seed in zip(iou, seeds, strict=True)
            ]
            for measure, column in zip(("miou", "miou_tail", "pixel_accuracy"), zip(*values, strict=True), strict=True):
                assert 100 * row[f"{measure}_mean"] == pytest.approx(statistics.fmean(column))
                assert 100 * row[f"{measure}_sd"] == pytest.approx(statistics.stdev(column))


def test_intervals_equal_those_of_an_independent_bootstrap(regimes):
    """Bootstrap with other draws: two of three seeds and all images, with replacement, in pairs."""
    table, rng = regimes["scratch"], np.random.default_rng(7)

    def counts(label):
        columns = [f"{part}/{n}" for part in PARTS for n in study.class_names(table)]
        return np.stack([rows[columns].to_numpy().reshape(len(rows), 3, -1) for rows in finals(table, label)])

    ours, theirs = counts(OURS), counts("jaccard + cross entropy")
    drawn = []
    for _ in range(3000):
        images, seeds = rng.integers(ours.shape[1], size=ours.shape[1]), rng.integers(3, size=2)
        totals = np.stack([part[np.ix_(seeds, images)].sum(1) for part in (ours, theirs)])
        iou = totals[:, :, 0] / (totals[:, :, 1] + totals[:, :, 2] - totals[:, :, 0])
        drawn.append(100 * (iou[0] - iou[1]).mean())
    interval = study.minus(study.compared("scratch"), OURS, "jaccard + cross entropy")["miou"]
    assert (interval.low, interval.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.1)


def test_fold_scores_equal_those_of_plain_pandas(regimes):
    for table in regimes.values():
        rows = table[table.role == "fold"]
        trials = study.trials(table)
        by_trial = rows.groupby(["objective", "model.objective", rows.get("model.optimizer.init_args.lr", rows.seed)])
        assert len(trials) == len(by_trial)
        for _, trial in by_trial:
            for part, index in ((trial, 0), (trial[trial.images.str.startswith("0016E5")], 1)):
                mean = statistics.fmean(percent_iou(part[part.fold == fold]).mean() for fold in (0, 1))
                assert min(abs(other.mean[index] - mean) for other in trials) < 1e-9


# The texts


def plain(text):
    """Return a Markdown text with single spaces and without tables."""
    return " ".join(" ".join(line for line in text.splitlines() if not line.startswith("|")).split())


def tables_in(text):
    return [block.strip() for block in re.findall(r"(?m)(?:^\|.*\n)+", text)]


@pytest.fixture(scope="module")
def readme():
    return (STUDY / "README.md").read_text()


def test_tables_of_the_readme_equal_the_printed_tables(readme, printed):
    for heading, table in printed.items():
        section = readme.split(f"## {heading}\n")[1].split("\n## ")[0]
        assert tables_in(section)[0] == table, heading


def interval(values):
    return f"{values.difference:+.2f} [{values.low:+.2f}, {values.high:+.2f}]"


def scratch_sentences(regimes, compared):
    table, comparison = regimes["scratch"], compared["scratch"]
    order = [r["objective"] for r in sorted(comparison.rows, key=lambda r: -r["miou_mean"]) if not r["shifted"]]
    rows = {row["objective"]: row for row in comparison.rows if not row["shifted"]}
    other = order[1]
    lead, entropy = study.minus(comparison, OURS, other), study.minus(comparison, OURS, "cross entropy")
    assert (order[0], other) == (OURS, "jaccard + cross entropy")
    yield (
        f"by {lead['miou'].difference:.2f} points of mIoU [{lead['miou'].low:.2f}, {lead['miou'].high:.2f}] over the next "
        "(Jaccard + cross entropy)"
    )
    # Table of the goal
    yield f"| mIoU | at least 1.0 more, interval above 0 | {interval(lead['miou'])} |"
    yield f"| rarest third | at least 3 more | {interval(lead['miou_tail'])}: not reached |"
    accurate = max((row["pixel_accuracy_mean"] for label, row in rows.items() if label != OURS))
    assert accurate == rows[other]["pixel_accuracy_mean"]
    above = entropy["pixel_accuracy"]
    yield (
        f"| pixel accuracy | at most 1 below cross entropy | {above.difference:.2f} above it [{above.low:+.2f}, "
        f"{above.high:+.2f}] ({100 * (accurate - rows[OURS]['pixel_accuracy_mean']):.2f} below the best other) |"
    )
    step = {label: row["step_ms"] for label, row in rows.items()}
    yield (
        f"| cost of a step | within 10 % | {step[OURS] / step[other]:.2f}x of the best other, "
        f"{step[OURS] / step['cross entropy']:.2f}x of cross entropy"
    )
    iou, theirs = class_means(table, OURS), class_means(table, other)
    gain = iou - theirs
    yield f"because of pole: {iou['pole']:.1f} % with power Dice, {theirs['pole']:.1f} with the best other"
    thirds = [values[["bicyclist", "pedestrian", "fence"]].mean() for values in (iou, theirs)]
    yield "The other three classes have {:.1f} against {:.1f}".format(*thirds)
    yield f"comes from sign ({iou['sign_symbol']:.1f} against {theirs['sign_symbol']:.1f})"
    yield f"then from fence ({gain['fence']:+.1f}) and bicyclist ({gain['bicyclist']:+.1f})"
    assert list(gain.sort_values(ascending=False).index[:3]) == ["sign_symbol", "fence", "bicyclist"]
    yield f"Pavement ({gain['pavement']:+.1f}) and building ({gain['building']:+.1f}) lose"
    # Shifts
    shift_gain = {label: miou(table, label, True) - miou(table, label) for label in order}
    lowered = [-value for value in shift_gain.values() if value < 0]
    good = [-shift_gain[label] for label in order[:6]]
    yield f"lower all good objectives ({min(good):.1f} to {max(good):.1f} points)"
    assert max(good) == max(lowered)
    assert max(shift_gain, key=shift_gain.get) == "balanced softmax"
    yield f"(balanced softmax {shift_gain['balanced softmax']:+.1f})"
    # Lost classes
    lost = {}
    for label in order:
        for rows_of_seed in finals(table, label):
            for name, value in percent_iou(rows_of_seed).items():
                if value < 0.05 and name not in ("pole", "sign_symbol"):
                    lost.setdefault((label, name), []).append(value)
    assert {key: len(values) for key, values in lost.items()} == {
        ("dice", "bicyclist"): 3,
        ("jaccard", "bicyclist"): 3,
        ("dice", "fence"): 1,
        ("jaccard", "fence"): 1,
        ("lovasz", "sky"): 1,
    }
    yield f"lose the bicyclist (IoU {max(map(max, lost.values())):.1f})"
    images = finals(table, OURS)[0].images
    frames = [int(name.split("_")[1]) for name in images]
    yield f"{len(images)} frames of {(max(frames) - min(frames)) / 30:.1f} seconds of 0016E5"
    # Learning rates
    rates = {}
    for (label, rate), rows_of in table[table.role == "fold"].groupby(["objective", "model.optimizer.init_args.lr"]):
        if rows_of["model.objective"].nunique() == 1:
            scores = [percent_iou(rows_of[rows_of.fold == fold]).mean() for fold in (0, 1)]
            rates.setdefault(label, {})[rate] = statistics.fmean(scores)
    early = ("cross entropy", "dice", "lovasz", "lovasz + cross entropy")
    better = [rates[label][0.012] - rates[label][0.006] for label in early]
    yield f"for the four objectives that had finished, 0.012 was better than 0.006, by {min(better):.1f} to {max(better):.1f} points"
    # Folds
    trials = study.best(table)
    near = {label: [(fold[1][0], fold[1][1]) for fold in trial.folds] for label, trial in trials.items()}
    others = {label: values for label, values in near.items() if label != OURS}
    leads = [near[OURS][fold][0] - max(values[fold][0] for values in others.values()) for fold in (0, 1)]
    assert f"{leads[0]:.1f}" == f"{leads[1]:.1f}"
    yield f"in both folds, by {leads[0]:.1f} points each over the next"
    rest = [max(values[fold][1] for label, values in others.items() if label != "dice") for fold in (0, 1)]
    yield (
        f"the highest rarest third: {near[OURS][0][1]:.1f} in the first (soft Dice {near['dice'][0][1]:.1f}, the rest at most "
        f"{rest[0]:.1f}), {near[OURS][1][1]:.1f} in the second (soft Dice {near['dice'][1][1]:.1f}, the rest at most "
        f"{rest[1]:.1f})"
    )


def finetune_sentences(regimes, compared):
    table, comparison = regimes["finetune"], compared["finetune"]
    scores = {label: miou(table, label) for label in table[table.role == "final"].objective.unique()}
    shifted = {label: miou(table, label, True) for label in scores}
    order = sorted(scores, key=lambda label: -scores[label])
    assert (order[0], order.index(OURS)) == ("dice", 3)
    dice = study.minus(comparison, OURS, "dice")["miou"]
    yield f"power Dice is fourth, {-dice.difference:.2f} points lower [{-dice.high:.2f}, {-dice.low:.2f}]"
    single = [
        percent_iou(ours).mean() - percent_iou(theirs).mean()
        for ours, theirs in zip(finals(table, OURS), finals(table, "dice"), strict=True)
    ]
    best = study.best(table)
    folds = best[OURS].mean[0] - best["dice"].mean[0]
    yield (
        f"0.5 against 1, and the difference ({interval(dice)}) is not significant: by seeds "
        f"{single[0]:+.1f}, {single[1]:+.1f} and {single[2]:+.1f}, on the folds {folds:+.1f}"
    )
    yield f"the weights reach {scores['cross entropy']:.1f}, and {shifted['cross entropy']:.1f} with one shift"
    yield f"Balanced softmax gains {shifted['balanced softmax'] - scores['balanced softmax']:.1f} by its shifts"
    loses = [scores[label] - shifted[label] for label in order[:7]]
    yield f"The objectives near the top lose {min(loses):.1f} to {max(loses):.1f} by theirs"
    yield f"From random weights power Dice had {miou(regimes['scratch'], OURS):.1f} after 24 epochs"
    entropy = study.minus(comparison, OURS, "cross entropy")
    tail, accurate = entropy["miou_tail"], entropy["pixel_accuracy"]
    yield (
        f"Compared with continued cross entropy: {interval(entropy['miou'])}, rarest third {tail.difference:+.1f} [{tail.low:+.1f}, "
        f"{tail.high:+.1f}], pixel accuracy {accurate.difference:+.2f}"
    )
    paper = "margin calibration (paper)"
    yield (
        f"({scores['cross entropy'] - scores[paper]:.1f} points below cross entropy itself): "
        f"{interval(study.minus(comparison, OURS, paper)['miou'])}"
    )


def ablation_sentences(regimes, compared):
    trials = {study.changed(trial.objective): trial for trial in study.trials(regimes["ablation"])}
    assert next(iter(trials)) == "nothing"
    miou_margin, hard, centre = trials["scheme miou, max_margin 1.0"], trials["margin hard"], trials["nothing"]
    yield "is at {:.1f} / {:.1f} on near images of fold 0".format(*miou_margin.folds[0, 1, :2])
    assert miou_margin.folds[0, 1, 0] == max(trial.folds[0, 1, 0] for trial in trials.values())
    assert round(centre.folds[0, 2, 0] - hard.folds[0, 2, 0]) == 10
    yield "ten points worse on far images of fold 0"
    yield f"sums with the running weights of mIoU ({trials['aggregation sum, weighting iou'].mean[0]:.1f})"
    seeds = [percent_iou(rows).mean() for rows in finals(regimes["scratch"], OURS)]
    yield f"(power Dice's seeds: {min(seeds):.1f} to {max(seeds):.1f})"


def table_sentences(regimes, compared):
    """Sentences about the tables."""
    for regime, runs in (("scratch", 126), ("finetune", 131), ("ablation", 40)):
        assert regimes[regime].run.nunique() == runs
        yield f"{runs} runs"
    elsewhere = [
        table[~table.commit.str.startswith("63ba173")].drop_duplicates(["run"])[["run", "role", "commit"]]
        for table in regimes.values()
    ]
    early = pd.concat(elsewhere).drop_duplicates("run")
    assert set(early.role) == {"fold"}
    yield f"{len(early)} runs on the folds"
    yield from sorted(early.commit.str[:7].unique())


SOURCES = [scratch_sentences, finetune_sentences, ablation_sentences, table_sentences]


@pytest.mark.parametrize("subject", [source.__name__ for source in SOURCES])
def test_readme_has_the_computed_numbers(subject, readme, sentences):
    text = " ".join(readme.split())
    for sentence in sentences[subject]:
        assert sentence in text


# Numbers that are not in the tables: settings, limits, names, and runs that were not kept
NOT_COMPUTED = [
    "just below 0, as one of its seeds",
    "0.5 M parameters",
    "half size (240x180), crops of 160x128, batches of 8",
    "24 epochs",
    "8 epochs",
    "7 MB each",
    "0001TP",
    "0016E5_05*",
    "0006R0",
    "0016E5_06*",
    "0016E5",
    "from 0.003, 0.006, 0.012 to 0.006, 0.012, 0.024",
    "had been tried at 0.006",
    "95 %",
    "seed 0",
    "the power 0.5 restores it",
    "learning rate 0.012",
    "0.25 and 0.5 are equal, 0.7 and 1 a point lower",
    "a largest margin of 1",
    "3 is worse",
    "With power 1",
    "decay 0.9",
    "fold 0",
    "fold 1",
    "after 32",
    "`git show 954c527:benchmarks/study/results`",
    "The runs used commit 63ba173",
    "`git worktree add ../study 63ba173`",
    "tu-test_resnet.r160_in1k",
    "bfloat16",
    # Runs that are not in the tables: half of the steps with soft Dice, running counts, one final run of the ablation
    "33.7 and 39.5, mean 36.57",
    "33.6 and 36.3, mean 35.0",
    "the power 0.25, seed 0, which had 55.9",
]


def test_every_number_of_the_readme_is_checked(readme, printed, sentences):
    text = re.sub(r"(?m)^    .*$", "", readme)  # commands
    for table in printed.values():
        assert table in text
        text = text.replace(table, " ")
    text = " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())
    for sentence in [*itertools.chain(*sentences.values()), *sorted(NOT_COMPUTED, key=len, reverse=True)]:
        text = text.replace(sentence, " # ")
    left = re.findall(r"\S*\d\S*", text)
    assert left == []


@pytest.mark.parametrize(
    ("page", "heading", "rows"),
    [("README.md", "Which objective wins?", 5), ("docs/how-to/objectives.md", "Evidence", 9)],
)
def test_pages_quote_the_scores_of_the_study(compared, page, heading, rows):
    comparison = compared["scratch"]
    scores = {row["objective"]: row for row in comparison.rows if not row["shifted"]}
    quoted = 0
    for line in tables_in(section(page, heading))[0].splitlines()[2:]:
        name, *cells = (cell.strip().replace("*", "") for cell in line.strip("|").split("|"))
        label = (
            name.replace(" (the default)", "").replace(" as in the paper", " (paper)").replace("Lovász", "lovasz").lower()
        )
        label = OURS if label == "power dice" else label
        row = scores[label]
        expected = [
            f"{100 * row[f'{m}_mean']:.1f} ± {100 * row[f'{m}_sd']:.1f}" for m in ("miou", "miou_tail", "pixel_accuracy")
        ]
        gain = None if label == OURS else study.minus(comparison, OURS, label)["miou"]
        expected.append("" if gain is None else f"{gain.difference:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]")
        assert cells == [*expected, f"{row['step_ms']:.0f} ms"], name
        quoted += 1
    assert quoted == rows


def test_pages_quote_the_study_on_fine_tuning(compared):
    tuned = compared["finetune"]
    score = {row["objective"]: row for row in tuned.rows if not row["shifted"]}
    shifted = {row["objective"]: row for row in tuned.rows if row["shifted"]}
    dice = study.minus(tuned, OURS, "dice")["miou"]

    def mean(row):
        return f"{100 * row['miou_mean']:.1f}"

    assert (
        f"8 more epochs of soft Dice give {mean(score['dice'])} ± {100 * score['dice']['miou_sd']:.1f}, of Jaccard "
        f"{mean(score['jaccard'])}, of power Dice {mean(score[OURS])} (minus soft Dice {dice.difference:+.1f} "
        f"[{dice.low:+.1f}, {dice.high:+.1f}]), of cross entropy {mean(score['cross entropy'])}, of the paper's loss "
        f"{mean(score['margin calibration (paper)'])}, and cross entropy with one shift of the logits per class, chosen on "
        f"held-out training images, has {mean(shifted['cross entropy'])}"
    ) in plain(section("docs/how-to/objectives.md", "Evidence"))
    assert (f"8 more epochs of soft Dice give {mean(score['dice'])}, of power Dice {mean(score[OURS])}.") in plain(
        section("README.md", "Which objective wins?")
    )


def test_page_on_the_papers_loss_quotes_the_study(compared):
    scratch, tuned = (
        {row["objective"]: f"{100 * row['miou_mean']:.1f}" for row in compared[name].rows if not row["shifted"]}
        for name in ("scratch", "finetune")
    )
    text = plain(section("docs/theory/margin-calibration.md", "Does it help?"))
    paper, reference = "margin calibration (paper)", "cross entropy"
    assert f"({scratch[paper]} against {scratch[reference]} % mIoU)" in text
    assert f"({tuned[paper]} against {tuned[reference]} % for cross entropy trained on)" in text


def section(page, heading):
    return (ROOT / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
