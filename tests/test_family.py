"""The calibrated family: its corners are the objectives that they should be, its weights are the gradient of mIoU."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from mcseg.kernels import ErrorKind
from mcseg.kernels.reference import class_margins, surrogate_errors, weighted_sum
from mcseg.losses import (
    DiceLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    MarginCalibrationLoss,
    TverskyLoss,
    margin_calibration_loss,
)
from mcseg.losses.family import confusion_shares, iou_weights
from mcseg.margins import margin_offsets

PIXELS = [9000, 700, 250, 50]
COMBINATIONS = [
    {"margin": margin, "surrogate": surrogate, "aggregation": aggregation, "weighting": weighting, "classes": classes}
    for margin, surrogate, aggregation, weighting, classes in [
        *itertools.product(("hard", "soft"), ("log", "sigmoid"), ("sum",), ("foreground", "uniform", "iou"), ("present",)),
        *itertools.product(("hard", "soft"), ("log", "sigmoid"), ("jaccard", "dice"), ("uniform",), ("present", "all")),
    ]
    if (surrogate, aggregation) != ("log", "dice")
]
COMBINATIONS += [
    options | {"power": 0.5}
    for options in COMBINATIONS
    if options["surrogate"] == "sigmoid" and options["classes"] == "present"
]


def ids(settings):
    return "-".join(map(str, settings.values()))


def case(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 5, 7), generator=generator)
    target[0, 0] = 255
    return logits.to(dtype), target


def make(**options):
    return MarginCalibrationLoss(4, **options).calibrate(PIXELS)


def labelled(logits, target):
    """(probabilities, label) of each labelled pixel, by plain Python."""
    for n, y, x in itertools.product(range(2), range(5), range(7)):
        if target[n, y, x] != 255:
            z = logits[n, :, y, x].tolist()
            total = sum(math.exp(value) for value in z)
            yield [math.exp(value) / total for value in z], int(target[n, y, x])


def soft_counts(logits, target):
    n, hits, others = [0] * 4, [0.0] * 4, [0.0] * 4
    for p, label in labelled(logits, target):
        for k in range(4):
            n[k] += k == label
            hits[k] += p[k] * (k == label)
            others[k] += p[k] * (k != label)
    return n, hits, others


def test_corner_cross_entropy():
    logits, target = case()
    loss = make(scheme="none", margin="soft", false_alarm_weight=0.0)(logits, target)
    expected = [-math.log(p[label]) for p, label in labelled(logits, target)]
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-10)


def test_corner_soft_jaccard_and_dice():
    logits, target = case()
    n, hits, others = soft_counts(logits, target)
    jaccard = 1 - sum((hits[k] + 0.5) / (n[k] + others[k] + 0.5) for k in range(4)) / 4
    dice = 1 - sum((2 * hits[k] + 0.5) / (n[k] + hits[k] + others[k] + 0.5) for k in range(4)) / 4
    options = {"scheme": "none", "margin": "soft", "surrogate": "sigmoid", "smooth": 0.5}
    assert float(make(aggregation="jaccard", **options)(logits, target)) == pytest.approx(jaccard, rel=1e-10)
    assert float(make(aggregation="dice", **options)(logits, target)) == pytest.approx(dice, rel=1e-10)


def test_corner_of_the_paper():
    logits, target = case()
    offsets = margin_offsets(PIXELS)
    errors, is_label = surrogate_errors(logits, target, *offsets, ErrorKind("hard", "log"))
    quarter = torch.full((4,), 0.25)
    general = weighted_sum(errors, is_label, 4 * quarter, quarter)
    expected = margin_calibration_loss(logits, target, offsets, reduction="none", backend="reference")
    assert torch.allclose(general, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(make()(logits, target), margin_calibration_loss(logits, target, offsets))


@pytest.mark.parametrize("aggregation", ["jaccard", "dice"])
def test_classes_of_the_mean(aggregation):
    logits, target = case()
    target[target == 2] = 0
    counts = {}
    for classes, smooth in (("present", 0.0), ("all", 0.0)):
        counts[classes] = float(
            make(scheme="none", margin="soft", surrogate="sigmoid", aggregation=aggregation, classes=classes, smooth=smooth)(
                logits, target
            )
        )
    # The absent class has ratio 0: of four losses, one is 1.
    assert counts["all"] == pytest.approx((3 * counts["present"] + 1) / 4, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6))
def test_margins_against_a_loop(z):
    logits = torch.tensor(z, dtype=torch.float64)[None]
    first = z.index(max(z))
    for k in range(len(z)):
        rivals = [value for j, value in enumerate(z) if j != k]
        assert float(class_margins(logits, "hard")[0, k]) == z[k] - max(rivals)
        top = max(rivals)
        soft = z[k] - (top + math.log(sum(math.exp(value - top) for value in rivals)))
        assert float(class_margins(logits, "soft")[0, k]) == pytest.approx(soft, rel=1e-9, abs=1e-9)
    assert float(class_margins(logits, "hard")[0, first]) >= 0


@pytest.mark.parametrize("options", COMBINATIONS, ids=ids)
def test_contract(options):
    """Finite for any finite logits, blind to void, 0 without gradient where all is void, in float32 or wider."""
    logits, target = case()
    loss = make(**options).eval()
    if options["weighting"] == "iou":
        loss.train()(logits, target)
        loss.eval()
    z = logits.clone().requires_grad_()
    value = loss(z, target)
    value.backward()
    assert value.shape == ()
    assert not z.grad[0, :, 0].any()
    changed = logits.clone()
    changed[0, :, 0] = torch.nan
    assert float(loss(changed, target)) == float(value.detach())
    # the gradient is that of the function, away from the kinks of hard margins
    index, step = (1, 2, 3, 4), 1e-6
    up, down = logits.clone(), logits.clone()
    up[index] += step
    down[index] -= step
    assert float(z.grad[index]) == pytest.approx(
        float((loss(up, target) - loss(down, target)) / (2 * step)), rel=1e-4, abs=1e-9
    )

    nothing = torch.full_like(target, 255)
    z = logits.clone().requires_grad_()
    value = loss(z, nothing)
    value.backward()
    assert float(value.detach()) == 0
    assert not z.grad.any()
    for dtype in (torch.float16, torch.bfloat16):
        z = (1e4 * logits.sign()).to(dtype).requires_grad_()
        value = loss(z, target)
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert z.grad.isfinite().all()


def test_weights_are_the_gradient_of_miou():
    """mIoU as a function of misses a and false alarms b, differentiated by autograd."""
    torch.manual_seed(0)
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    a = (p * 0.3).requires_grad_()
    b = torch.tensor([0.05, 0.02, 0.04, 0.01], dtype=torch.float64).requires_grad_()
    ((p - a) / (p + b)).mean().backward()
    hits = (p - a).detach()
    misses, false_alarms = iou_weights(torch.stack([p, hits, hits + b.detach()]), floor=0.0)
    scale = misses[0] / -a.grad[0]
    assert torch.allclose(misses, -scale * a.grad, rtol=1e-12)
    assert torch.allclose(false_alarms, -scale * b.grad, rtol=1e-12)
    assert float((misses * p).sum()) == pytest.approx(1, abs=1e-12)


def test_weights_of_classes_without_labels_and_the_floor():
    shares = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.0, 0.0], [0.9, 0.05, 0.05]], dtype=torch.float64)
    misses, false_alarms = iou_weights(shares)
    assert float(misses[2]) == float(false_alarms[2]) == 0
    assert float(false_alarms[1] / misses[1]) == pytest.approx(0.1)  # IoU 0, clamped
    assert float(false_alarms[0] / misses[0]) == pytest.approx(1)


def test_confusion_shares_against_scikit_learn():
    logits, target = case()
    kept = target != 255
    counts = confusion_matrix(target[kept], logits.argmax(1)[kept], labels=range(4))
    expected = np.stack([counts.sum(1), counts.diagonal(), counts.sum(0)]) / counts.sum()
    assert np.allclose(confusion_shares(logits, target, 255).numpy(), expected, atol=1e-15)


def test_running_shares_move_in_training_alone_and_travel_in_the_checkpoint():
    loss = make(weighting="iou", decay=0.75)
    first, second = case(0), case(1)
    loss(*first)
    loss(*second)
    a, b = confusion_shares(*first, 255), confusion_shares(*second, 255)
    assert torch.allclose(loss.running_shares, 0.25 * (0.75 * a + b))
    loss.eval()(*first)
    assert torch.allclose(loss.running_shares, 0.25 * (0.75 * a + b))
    loss.train()(first[0], torch.full_like(first[1], 255))  # nothing labelled, nothing learned: only the scale changes
    copy = MarginCalibrationLoss(4, weighting="iou")
    copy.load_state_dict(loss.state_dict())
    assert torch.equal(copy.eval()(*first), loss.eval()(*first))
    assert loss.half().running_shares.dtype == torch.float64


def region_losses():
    """Those of regions that are ratios of sums."""
    return {
        "dice": DiceLoss(classes="all"),
        "jaccard": JaccardLoss(),
        "tversky": TverskyLoss(gamma=1.5),
        "generalized": GeneralizedDiceLoss(),
    }


def test_soft_counts_of_regions_are_told_as_rates_per_class():
    logits, target = case()
    pixels = list(labelled(logits, target))
    misses = [[1 - p[k] for p, y in pixels if y == k] for k in range(4)]
    alarms = [[p[k] for p, y in pixels if y != k] for k in range(4)]
    for loss in (DiceLoss(), JaccardLoss(per_image=True), TverskyLoss(classes="all"), GeneralizedDiceLoss()):
        loss(logits, target)
        for name, errors in (("miss_rate", misses), ("false_alarm_rate", alarms)):
            expected = [sum(values) / len(values) for values in errors]
            assert loss.class_statistics[name].tolist() == pytest.approx(expected, rel=1e-12)


def ratio_as_rank(rank, folder):
    """One of two processes with half of the batch each: loss, and gradient as DDP averages it."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    logits, target = case()
    results = {}
    for options in ({"aggregation": "dice", "surrogate": "sigmoid"}, {"weighting": "iou"}):
        z = logits[rank : rank + 1].clone().requires_grad_()
        loss = make(margin="soft", **options)
        value = loss(z, target[rank : rank + 1])
        value.backward()
        weights = loss.running_shares.tolist() if "weighting" in options else []
        results[ids(options)] = [float(value.detach()), (z.grad / 2).flatten().tolist(), weights]
    for name, loss in region_losses().items():
        z = logits[rank : rank + 1].clone().requires_grad_()
        value = loss(z, target[rank : rank + 1])
        value.backward()
        results[name] = [float(value.detach()), (z.grad / 2).flatten().tolist()]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_ratio_of_one(tmp_path):
    torch.multiprocessing.spawn(ratio_as_rank, (str(tmp_path),), nprocs=2)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    logits, target = case()
    losses = {"dice-sigmoid": make(margin="soft", aggregation="dice", surrogate="sigmoid"), **region_losses()}
    for name, loss in losses.items():
        z = logits.clone().requires_grad_()
        value = loss(z, target)
        value.backward()
        for rank in range(2):
            found, gradient = results[rank][name][:2]
            assert found == pytest.approx(float(value.detach()), rel=1e-12), name
            assert np.allclose(gradient, z.grad[rank].flatten(), atol=1e-15), name
    loss = make(margin="soft", weighting="iou")
    loss(logits, target)
    assert np.allclose(results[0]["iou"][2], loss.running_shares.numpy(), atol=1e-15)
    assert results[0]["iou"][2] == results[1]["iou"][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": "wide"}, "margin: found 'wide', expected one of 'hard', 'soft'"),
        ({"aggregation": "mean"}, "aggregation: found 'mean'"),
        ({"aggregation": "dice", "reduction": "none"}, "reduction: found 'none', expected 'mean'"),
        ({"aggregation": "dice"}, "surrogate: found 'log' with aggregation 'dice', expected 'sigmoid'"),
        ({"smooth": -1.0}, "smooth: found -1.0, expected a finite number >= 0"),
        ({"decay": 1.0}, "decay: found 1.0, expected 0 <= decay < 1"),
    ],
    ids=str,
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        MarginCalibrationLoss(4, **options)


@pytest.mark.parametrize("label", [0, 1])
def test_errors_of_confident_pixels_keep_their_digits(label):
    """A miss rate of 1e-17 is what it is, not 0: 1 - p would have lost it."""
    z = [40.0, 0.0, -3.0]
    foreground, background = [2.0, 1.0, 0.5], [0.25, 3.0, 6.0]
    errors, is_label = surrogate_errors(
        torch.tensor([z], dtype=torch.float64),
        torch.tensor([label]),
        torch.tensor(foreground, dtype=torch.float64),
        torch.tensor(background, dtype=torch.float64),
        ErrorKind("soft", "sigmoid"),
    )
    expected = []
    for k in range(3):
        s = z[k] - math.log(sum(math.exp(z[j]) for j in range(3) if j != k))
        expected.append(1 / (1 + math.exp(s - foreground[k] if k == label else -s - background[k])))
    assert is_label.tolist() == [[k == label for k in range(3)]]
    assert errors[0].tolist() == pytest.approx(expected, rel=1e-12)
