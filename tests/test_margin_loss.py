"""MarginCalibrationLoss against values by hand and of the authors, reductions, behaviour as a module; CrossEntropyLoss."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from conftest import golden_cases
from torch import nn

from mcseg.losses import CrossEntropyLoss, MarginCalibrationLoss, margin_calibration_loss
from mcseg.margins import MarginOffsets, margin_offsets

BACKENDS = ["auto", "fused", "reference"]
COUNTS = [1000, 10, 300, 40]


def softplus(t):
    return math.log1p(math.exp(t))


@pytest.fixture
def case():
    torch.manual_seed(0)
    target = torch.randint(4, (2, 5, 6))
    target[0, :2] = 255
    return torch.randn(2, 4, 5, 6) * 3, target


@pytest.fixture
def loss():
    return MarginCalibrationLoss(4).calibrate(COUNTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    offsets = MarginOffsets(torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.1, 0.2, 0.3]))
    logits = torch.tensor([[2.0, -1.0, 1.0], [0.0, 0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1])
    # margins: (1, -3, -1) and (-4, -4, 4)
    pixels = [
        (3 * softplus(0.5 - 1) + softplus(0.2 - 3) + softplus(0.3 - 1)) / 3,
        (3 * softplus(1.0 + 4) + softplus(0.1 - 4) + softplus(0.3 + 4)) / 3,
    ]
    none = margin_calibration_loss(logits, target, offsets, reduction="none", backend=backend)
    assert none.tolist() == pytest.approx(pixels, rel=1e-7)  # offsets are float32 here
    assert margin_calibration_loss(logits, target, offsets, backend=backend).item() == pytest.approx(sum(pixels) / 2)
    light = margin_calibration_loss(logits[:1], target[:1], offsets, foreground_weight=0.0, backend=backend)
    assert light.item() == pytest.approx((softplus(0.2 - 3) + softplus(0.3 - 1)) / 3, rel=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(6))
def test_values_of_the_authors_implementation(number, backend):
    numbers = golden_cases()[number]
    logits = torch.from_numpy(numbers["logits"]).double().requires_grad_()
    loss = MarginCalibrationLoss(
        logits.shape[1], tau=float(numbers["tau"]), upsilon=float(numbers["upsilon"]), backend=backend
    ).calibrate(numbers["class_pixels"])
    value = loss(logits, torch.from_numpy(numbers["target"]))
    value.backward()
    assert value.item() == pytest.approx(numbers["margin_loss"].item(), rel=1e-10)
    gradient = torch.from_numpy(numbers["margin_grad"])
    # elements that cancel to 1e-10 of the largest element have no exact digits left
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-10, atol=1e-13 * gradient.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions(case, backend):
    logits, target = case
    offsets = margin_offsets(COUNTS)

    def reduced(reduction):
        z = logits.clone().requires_grad_()
        value = margin_calibration_loss(z, target, offsets, reduction=reduction, backend=backend)
        value.sum().backward()
        return value.detach(), z.grad

    (none, none_grad), (total, sum_grad), (mean, mean_grad) = map(reduced, ("none", "sum", "mean"))
    labelled = target != 255
    assert none[~labelled].eq(0).all()
    assert none[labelled].gt(0).all()
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none[labelled].mean())
    torch.testing.assert_close(sum_grad, none_grad)
    torch.testing.assert_close(mean_grad, none_grad / labelled.sum())
    assert mean.shape == total.shape == ()
    assert mean.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_labelled(loss, case, backend, reduction):
    logits = case[0].requires_grad_()
    loss.backend, loss.reduction = backend, reduction
    value = loss(logits, torch.full_like(case[1], 255))
    value.backward()
    assert value.item() == 0
    assert logits.grad.eq(0).all()
    assert loss(logits[:0], case[1][:0]).item() == 0


def test_the_module_passes_its_arguments_to_the_function(case):
    settings = {"foreground_weight": 2.0, "ignore_index": 3, "reduction": "none", "backend": "reference"}
    loss = MarginCalibrationLoss(4, scheme="miou", max_margin=2.0, **settings).calibrate(COUNTS)
    logits, target = case[0], case[1].clamp(max=3)
    expected = margin_calibration_loss(logits, target, margin_offsets(COUNTS, "miou", max_margin=2.0), **settings)
    assert torch.equal(loss(logits, target), expected)
    assert expected[target == 3].eq(0).all()
    other = MarginCalibrationLoss(4, tau=2.0, upsilon=3.0).calibrate(torch.tensor(COUNTS))
    expected = margin_calibration_loss(*case, margin_offsets(COUNTS, tau=2.0, upsilon=3.0), foreground_weight=4)
    assert torch.equal(other(*case), expected)
    assert (other.num_classes, other.tau, other.upsilon, other.foreground_weight) == (4, 2.0, 3.0, None)


def test_an_uncalibrated_loss_raises(case):
    loss = MarginCalibrationLoss(4)
    assert not loss.is_calibrated
    assert loss.foreground_offsets.isnan().all()
    for use in (lambda: loss(*case), lambda: loss.offsets):
        with pytest.raises(RuntimeError, match=r"not calibrated: call loss.calibrate\(class_pixels\)") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert "calibrated=False" in repr(loss)
    assert "num_classes=4, scheme='ijcv2022', tau=10.0" in repr(loss)
    assert loss.calibrate(COUNTS) is loss
    assert loss.is_calibrated
    assert "calibrated=True" in repr(loss)
    assert torch.equal(loss.offsets.foreground, margin_offsets(COUNTS).foreground)
    assert torch.equal(loss.offsets.background, margin_offsets(COUNTS).background)


def test_wrong_number_of_counts_changes_nothing():
    loss = MarginCalibrationLoss(3)
    with pytest.raises(ValueError, match=r"found 4 counts, expected 3"):
        loss.calibrate(COUNTS)
    assert not loss.is_calibrated


def test_state_dict_round_trip(loss, case):
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"foreground_offsets", "background_offsets"}
    for assign in (False, True):
        other = MarginCalibrationLoss(4)
        other.load_state_dict(state, assign=assign)
        assert other.is_calibrated
        assert torch.equal(other(*case), loss(*case))
    # as part of a model, then uncalibrated again
    model = nn.ModuleDict({"objective": MarginCalibrationLoss(4)})
    model.load_state_dict({f"objective.{name}": value for name, value in state.items()})
    assert torch.equal(model["objective"](*case), loss(*case))
    loss.load_state_dict(MarginCalibrationLoss(4).state_dict())
    assert not loss.is_calibrated


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("cpu", torch.half)])
def test_casting_does_not_change_the_offsets(loss, cast):
    expected = margin_offsets(COUNTS)
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "objective": loss})
    before = model["layer"].weight.dtype
    cast(model)
    assert model["layer"].weight.dtype != before
    for actual, offsets in zip(loss.offsets, expected, strict=True):
        assert actual.dtype == torch.float64
        assert torch.equal(actual, offsets)
    assert list(loss.state_dict()) == ["foreground_offsets", "background_offsets"]


def test_built_on_the_meta_device(case):
    with torch.device("meta"):
        loss = MarginCalibrationLoss(4)
    loss.to_empty(device="cpu")
    assert not loss.is_calibrated
    assert loss.foreground_offsets.isnan().all()
    assert math.isfinite(loss.calibrate(COUNTS)(*case).item())
    assert loss.to("meta").foreground_offsets.is_meta
    assert not loss.to_empty(device="cpu").is_calibrated


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_are_independent(loss, case, clone):
    expected = loss(*case)
    other = clone(loss)
    assert torch.equal(other(*case), expected)
    other.calibrate([1, 2, 3, 4])
    assert torch.equal(loss(*case), expected)
    assert not clone(MarginCalibrationLoss(4)).is_calibrated


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_compile(loss, case, backend):
    loss.backend = backend
    logits, target = case[0].requires_grad_(), case[1]
    expected = loss(logits, target)
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value = compiled(logits, target)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], gradient, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(compiled(logits, target), expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_export(loss, case, strict, backend):
    loss.backend = backend
    logits, target = case
    exported = torch.export.export(loss, (logits, target), strict=strict).module()
    torch.testing.assert_close(exported(logits, target), loss(logits, target), rtol=1e-6, atol=0)
    flipped = logits.flip(1)
    torch.testing.assert_close(exported(flipped, target), loss(flipped, target), rtol=1e-6, atol=0)
    if backend == "auto" and hasattr(torch.compiler, "is_exporting"):
        z = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(z, target), z)
        (actual,) = torch.autograd.grad(exported(z, target), z)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_loss(loss, case, dtype):
    logits = case[0].to(dtype)
    value = loss(logits, case[1].to(torch.uint8))
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.item() == pytest.approx(loss(logits.double(), case[1]).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "target", "settings", "error", "message"),
    [
        (
            torch.zeros(1, 4, 2, dtype=torch.long),
            torch.zeros(1, 2).long(),
            {},
            TypeError,
            "logits: found dtype torch.int64",
        ),
        (torch.zeros(1, 4, 2), torch.zeros(1, 2), {}, TypeError, "target: found dtype torch.float32, .* .long"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 2).bool(), {}, TypeError, "target: found dtype torch.bool"),
        (torch.zeros(4), torch.zeros(()).long(), {}, ValueError, r"logits: found shape \(4,\), expected \(N, C"),
        (torch.zeros(2, 1, 3), torch.zeros(2, 3).long(), {}, ValueError, r"found shape \(2, 1, 3\), .* C >= 2"),
        (
            torch.zeros(1, 4, 2, 3),
            torch.zeros(1, 2, 2).long(),
            {},
            ValueError,
            r"target: found shape \(1, 2, 2\), expected \(1, 2, 3\)",
        ),
        (torch.zeros(1, 4, 2), torch.zeros(1, 4, 2).long(), {}, ValueError, "without a class dimension"),
        (torch.zeros(1, 5, 2), torch.zeros(1, 2).long(), {}, ValueError, r"found 5 classes but foreground offsets"),
        (
            torch.zeros(1, 4, 2),
            torch.full((1, 2), 7),
            {},
            ValueError,
            r"found label 7, expected 0..3 or ignore_index 255",
        ),
        (torch.zeros(1, 4, 2), torch.zeros(1, 2).long(), {"reduction": "avg"}, ValueError, "reduction: found 'avg'"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 2).long(), {"backend": "cuda"}, ValueError, "backend: found 'cuda'"),
        (
            torch.zeros(1, 4, 2),
            torch.zeros(1, 2).long(),
            {"foreground_weight": -1.0},
            ValueError,
            "foreground_weight: found -1.0, expected a finite number >= 0",
        ),
    ],
)
def test_invalid_arguments_are_refused(logits, target, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        margin_calibration_loss(logits, target, margin_offsets(COUNTS), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, "num_classes: found 1, expected at least 2"),
        ({"scheme": "mean"}, "scheme: found 'mean', expected one of"),
        ({"tau": -1.0}, "tau: found -1.0, expected a finite number > 0"),
        ({"upsilon": 0.0}, "upsilon: found 0.0"),
        ({"max_margin": math.inf}, "max_margin: found inf"),
        ({"foreground_weight": math.nan}, "foreground_weight: found nan"),
        ({"reduction": "max"}, "reduction: found 'max', expected one of 'mean', 'sum', 'none'"),
        ({"backend": "fast"}, "backend: found 'fast', expected one of 'auto'"),
    ],
)
def test_settings_are_checked_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        MarginCalibrationLoss(**{"num_classes": 4} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "miou", "tau": 3.0}, "tau: found 3.0, but scheme 'miou' uses only max_margin; remove tau"),
        ({"scheme": "miou", "upsilon": 0.5}, "upsilon: found 0.5, but scheme 'miou'"),
        ({"max_margin": 2.0}, "max_margin: found 2.0, but scheme 'ijcv2022' uses only tau and upsilon"),
        ({"scheme": "none", "tau": 3.0}, "tau: found 3.0, but scheme 'none' uses none of"),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MarginCalibrationLoss(4, **settings)


def test_the_loss_has_nine_arguments():
    names = list(inspect.signature(MarginCalibrationLoss).parameters)
    nine = "num_classes scheme tau upsilon foreground_weight ignore_index reduction backend max_margin"
    assert names == nine.split()


def test_cross_entropy_against_a_loop():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 3, 5))
    target[0, 0] = 255
    losses = [
        math.log(sum(math.exp(value) for value in logits[n, :, y, x])) - float(logits[n, target[n, y, x], y, x])
        for n in range(2)
        for y in range(3)
        for x in range(5)
        if target[n, y, x] != 255
    ]
    assert float(CrossEntropyLoss()(logits, target)) == pytest.approx(sum(losses) / len(losses), abs=1e-12)
    half = CrossEntropyLoss()(logits.half(), target)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(sum(losses) / len(losses), abs=2e-3)


def test_cross_entropy_is_zero_without_labels():
    logits = torch.randn(1, 4, 3, 5, requires_grad=True)
    loss = CrossEntropyLoss()(logits, torch.full((1, 3, 5), 255))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_uint8_labels_and_an_ignore_index_that_uint8_cannot_hold():
    """-100 wraps to 156 in uint8, but pixels of class 156 stay labelled."""
    logits = torch.randn(1, 171, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([[[156, 0, 170], [156, 3, 156]]], dtype=torch.uint8)
    loss = MarginCalibrationLoss(171, scheme="none", ignore_index=-100)
    pixels = []
    for y, x in ((y, x) for y in range(2) for x in range(3)):
        z, label = logits[0, :, y, x].tolist(), int(target[0, y, x])
        margins = [z[k] - max(z[:k] + z[k + 1 :]) for k in range(171)]
        errors = [math.log1p(math.exp(-s if k == label else s)) for k, s in enumerate(margins)]
        pixels.append((171 * errors[label] + sum(errors) - errors[label]) / 171)
    assert float(loss(logits, target)) == pytest.approx(sum(pixels) / 6, rel=1e-12)
