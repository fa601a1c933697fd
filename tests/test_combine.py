"""SumLoss: values, warm-up, calibration, and refused settings."""

import pytest
import torch
from torch import nn

from mcseg.losses import CrossEntropyLoss, MarginCalibrationLoss
from mcseg.losses.combine import SumLoss

PIXELS = [900, 80, 20]
TWO = [
    {"class_path": "mcseg.losses.MarginCalibrationLoss", "init_args": {"scheme": "miou", "max_margin": 2.0}, "weight": 0.25},
    {"class_path": "mcseg.losses.CrossEntropyLoss"},
]


def case():
    torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 4, 5))
    target[0, 0] = 255
    return torch.randn(2, 3, 4, 5, dtype=torch.float64), target


def test_the_sum_is_weighted_and_has_its_terms():
    logits, target = case()
    loss = SumLoss(3, TWO)
    assert not loss.is_calibrated
    loss.calibrate(PIXELS)
    assert loss.is_calibrated
    margin = MarginCalibrationLoss(3, scheme="miou", max_margin=2.0).calibrate(PIXELS)(logits, target)
    entropy = CrossEntropyLoss()(logits, target)
    assert float(loss(logits, target)) == pytest.approx(0.25 * float(margin) + float(entropy), rel=1e-12)
    assert {name: float(value) for name, value in loss.terms.items()} == {
        "MarginCalibrationLoss": float(margin),
        "CrossEntropyLoss": float(entropy),
    }


def test_warm_up_by_cross_entropy():
    logits, target = case()
    loss = SumLoss(3, [{"class_path": "mcseg.losses.MarginCalibrationLoss"}], warmup_steps=2, blend_steps=3).calibrate(
        PIXELS
    )
    start = float(CrossEntropyLoss()(logits, target))
    end = float(MarginCalibrationLoss(3).calibrate(PIXELS)(logits, target))
    values = [float(loss(logits, target)) for _ in range(7)]
    shares = [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert values == pytest.approx([start + share * (end - start) for share in shares], rel=1e-9)
    copy = SumLoss(3, [{"class_path": "mcseg.losses.MarginCalibrationLoss"}], warmup_steps=2, blend_steps=3)
    copy.load_state_dict(loss.state_dict())
    assert float(copy(logits, target)) == pytest.approx(end)  # a resumed run does not warm up again
    for _ in range(3):
        loss.eval()(logits, target)
    assert int(loss.steps) == 7  # validation does not count


def test_the_same_objective_twice_has_two_terms():
    loss = SumLoss(3, [{"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"ignore_index": 255}}] * 2)
    loss(*case())
    assert list(loss.terms) == ["CrossEntropyLoss1", "CrossEntropyLoss2"]


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ([], "objectives: found none"),
        ([{"class": "x"}], "found the keys \\['class'\\], expected class_path"),
        ([{"class_path": "mcseg.losses.Nothing"}], "mcseg.losses.Nothing"),
        ([{"class_path": "mcseg.losses.CrossEntropyLoss", "init_args": {"x": 1}}], "mcseg.losses.CrossEntropyLoss .*'x'"),
        ([{"class_path": "pathlib.Path"}], "found pathlib.Path, expected a class derived from torch.nn.Module"),
    ],
    ids=str,
)
def test_invalid_objectives_are_refused(objectives, message):
    with pytest.raises(ValueError, match=message):
        SumLoss(3, objectives)


def test_only_modules_are_called(tmp_path):
    call = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "owned")}}
    with pytest.raises(ValueError, match="found os.mkdir, expected a class derived from torch.nn.Module"):
        SumLoss(3, [call])
    assert not list(tmp_path.iterdir())


def test_modules_do_not_share_their_settings():
    entries = [{"class_path": "mcseg.losses.CrossEntropyLoss"}]
    loss = SumLoss(3, entries)
    entries[0]["weight"] = 7
    assert loss.objectives == [{"class_path": "mcseg.losses.CrossEntropyLoss"}]
    assert isinstance(loss.parts[0], nn.Module)


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match=f"weight: found {weight}"):
        SumLoss(3, [{"class_path": "mcseg.losses.DiceLoss", "weight": weight}])
