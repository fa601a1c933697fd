"""Margin offsets and MarginCalibrationLoss against values by hand and of the authors, invariances; CrossEntropyLoss."""

import copy
import inspect
import io
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import golden_cases
from hypothesis import given, settings
from hypothesis import strategies as st
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


COUNT_LISTS = st.lists(st.integers(1, 10**9), min_size=2, max_size=30)


def by_hand(counts, tau, upsilon):
    total = sum(counts)
    background = [tau * math.sqrt(total - n) / n for n in counts]
    foreground = [
        b * (n / total) * math.sqrt(n) / (upsilon * (total - n) - (n / total) * math.sqrt(total - n))
        for n, b in zip(counts, background, strict=True)
    ]
    return foreground, background


def assert_close(offsets, foreground, background, rtol=1e-12):
    for actual, expected in zip(offsets, (foreground, background), strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)


@pytest.mark.parametrize("number", range(6))
def test_offsets_of_the_authors_implementation(number):
    case = golden_cases()[number]
    offsets = margin_offsets(case["class_pixels"], tau=float(case["tau"]), upsilon=float(case["upsilon"]))
    assert_close(offsets, case["foreground_offsets"], case["background_offsets"])


@settings(deadline=None, max_examples=50)
@given(COUNT_LISTS, st.floats(0.01, 1000), st.floats(1, 10))
def test_ijcv2022_is_the_formula_and_linear_in_tau(counts, tau, upsilon):
    offsets = margin_offsets(counts, tau=tau, upsilon=upsilon)
    assert_close(offsets, *by_hand(counts, tau, upsilon), rtol=1e-11)
    assert min(offsets.foreground.min(), offsets.background.min()) > 0
    one = margin_offsets(counts, tau=1.0, upsilon=upsilon)
    assert_close(offsets, one.foreground * tau, one.background * tau)


@settings(deadline=None, max_examples=50)
@given(COUNT_LISTS, st.floats(0.01, 100), st.integers(2, 10**6))
def test_miou_ratios_scale_and_independence_of_size(counts, max_margin, factor):
    offsets = margin_offsets(counts, "miou", max_margin=max_margin)
    n = torch.tensor(counts, dtype=torch.float64)
    m = n.sum() - n
    torch.testing.assert_close(offsets.background / offsets.foreground, (m / n) ** 0.25, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        offsets.foreground / offsets.foreground[0], (n[0] / n) ** 0.25, rtol=1e-12, atol=0
    )  # the same scale for all classes
    assert max(offsets.foreground.max(), offsets.background.max()).item() == pytest.approx(max_margin, rel=1e-14)
    assert_close(margin_offsets([n * factor for n in counts], "miou", max_margin=max_margin), *offsets)


def test_miou_ignores_tau_and_upsilon():
    assert_close(margin_offsets([5, 70], "miou", tau=3, upsilon=0.001), *margin_offsets([5, 70], "miou"))


def test_types_of_counts():
    expected = by_hand([3, 50, 7], 10.0, 1.0)
    as_array = np.array([3, 50, 7])
    read_only = as_array.astype(np.float64)
    read_only.flags.writeable = False
    for counts in (
        [3, 50, 7],
        (3.0, 50.0, 7.0),
        as_array,
        as_array.astype(np.uint64),
        as_array[::-1][::-1],
        read_only,
        torch.tensor(as_array),
        torch.tensor([3.0, 50.0, 7.0], dtype=torch.float16, requires_grad=True),
    ):
        assert_close(margin_offsets(counts), *expected)


@pytest.mark.parametrize("scheme", ["ijcv2022", "miou"])
def test_a_class_without_pixels_is_named_and_does_not_change_the_other_offsets(scheme):
    with pytest.warns(UserWarning, match=r"no pixels of class 1, 4; its offsets are 0"):
        offsets = margin_offsets([10, 0, 30, 5, 0], scheme)
    present = margin_offsets([10, 30, 5], scheme)
    zeros = torch.zeros(2, dtype=torch.float64)
    assert_close(MarginOffsets(*(o[[0, 2, 3]] for o in offsets)), *present)
    assert_close(MarginOffsets(*(o[[1, 4]] for o in offsets)), zeros, zeros)


@pytest.mark.parametrize(
    ("counts", "settings", "message"),
    [
        ([[1, 2], [3, 4]], {}, r"found shape \(2, 2\), expected \(C,\)"),
        (5, {}, r"found shape \(\), expected \(C,\)"),
        ("many", {}, r"class_pixels: found 'many'"),
        ([5], {}, r"found 1 class\(es\), expected at least 2"),
        ([5, -1, 3, -2], {}, r"found -1 for class 1, 3, expected finite counts"),
        ([5, math.nan, 3], {}, r"found nan for class 1, expected finite counts"),
        ([5, 4, math.inf], {}, r"found inf for class 2, expected finite counts"),
        ([0.25, 0.75], {}, r"found 0.25 for class 0, 1, .*not shares; multiply"),
        ([0, 7, 0], {}, r"found pixels of class 1 only, expected pixels of at least two classes"),
        ([0, 0], {}, r"found no pixels, expected"),
        ([5, 4], {"tau": 0.0}, r"tau: found 0.0, expected a finite number > 0"),
        ([5, 4], {"tau": math.inf}, r"tau: found inf"),
        ([5, 4], {"upsilon": -1.0}, r"upsilon: found -1.0"),
        ([5, 4], {"upsilon": math.nan}, r"upsilon: found nan"),
        ([5, 4], {"max_margin": 0}, r"max_margin: found 0,"),
        ([5, 4], {"scheme": "linear"}, r"scheme: found 'linear', expected one of 'ijcv2022', 'miou'"),
    ],
)
@pytest.mark.filterwarnings("ignore:class_pixels")
def test_invalid_counts_are_refused(counts, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        margin_offsets(counts, **settings)
    assert "\n" not in str(caught.value)


def test_the_error_for_a_small_upsilon_names_the_class_and_a_valid_upsilon():
    counts = [10, 1000, 20]
    with pytest.raises(ValueError, match=r"foreground offset of class 1 negative or infinite; expected at least") as e:
        margin_offsets(counts, upsilon=0.1)
    enough = float(str(e.value).split("at least ")[1].split()[0])
    assert enough == pytest.approx(1000 / 1030 / math.sqrt(30), abs=2e-6)
    assert_close(margin_offsets(counts, upsilon=enough), *by_hand(counts, 10.0, enough), rtol=1e-9)
    assert margin_offsets(counts, upsilon=enough).foreground.min() > 0
    with pytest.raises(ValueError, match="class 0"):
        margin_offsets([4, 4], upsilon=0.25)  # exactly p / sqrt(m): infinite
