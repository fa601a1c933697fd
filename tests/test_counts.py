"""Counts of errors at soft margins: against a loop over pixels, rivals and classes, and their gradient against it as well."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcseg.kernels import ErrorKind, counts
from mcseg.kernels import error_counts as counts_of_kind
from mcseg.losses import DiceLoss, MarginCalibrationLoss

VOID = 255
POWERS = [1.0, 0.5, 0.3]


def error_counts(logits, target, offsets, power, ignore_index):
    return counts_of_kind(logits, target, offsets, ErrorKind("soft", "sigmoid", power, ignore_index), "fused")


def draw(shape, seed=0, dtype=torch.float64, void=0.2, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    pixels = (shape[0], *shape[2:])
    target = torch.randint(shape[1], pixels, generator=generator)
    target[torch.rand(pixels, generator=generator) < void] = VOID
    offsets = tuple(2 * torch.rand(2, shape[1], generator=generator, dtype=torch.float64) - 0.5)
    return logits, target, offsets


def oracle(logits, target, offsets, power):
    """Counts, and the gradient of their sum weighted by (1 + k) for misses and (2 + k) / 3 for false alarms of class k."""
    num_classes = logits.shape[1]
    rows = logits.double().movedim(1, -1).reshape(-1, num_classes).tolist()
    found = [[0.0] * num_classes for _ in range(3)]
    gradients = []
    for z, y in zip(rows, target.flatten().tolist(), strict=True):
        gradient = [0.0] * num_classes
        for k in range(num_classes) if y != VOID else ():
            rivals = [j for j in range(num_classes) if j != k]
            top = max(z[j] for j in rivals)
            parts = [math.exp(z[j] - top) for j in rivals]
            margin = z[k] - top - math.log(sum(parts))
            offset = offsets[0 if k == y else 1][k] if offsets else 0.0
            r = 1 / (1 + math.exp(-(float(offset) + (-margin if k == y else margin))))
            found[0][k] += k == y
            found[1 if k == y else 2][k] += 1 - (1 - r) ** power
            slope = power * (1 - r) ** power * r * (-(1 + k) if k == y else (2 + k) / 3)  # in the margin
            gradient[k] += slope
            for j, part in zip(rivals, parts, strict=True):
                gradient[j] -= slope * part / sum(parts)
        gradients.append(gradient)
    shape = (logits.shape[0], *logits.shape[2:], num_classes)
    return torch.tensor(found, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64).view(shape).movedim(-1, 1)


def run(logits, target, offsets, power):
    z = logits.detach().requires_grad_()
    found = error_counts(z, target, offsets, power, VOID)
    classes = torch.arange(logits.shape[1], device=z.device)
    (gradient,) = torch.autograd.grad((found[1] * (1 + classes) + found[2] * (2 + classes) / 3).sum(), z)
    assert gradient.dtype == logits.dtype
    return found.detach(), gradient


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("with_offsets", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 4), (1, 3, 5, 2), (2, 19, 4, 3), (3, 5, 7), (1, 4, 2, 3, 2), (9, 6), (2, 65, 3)]
)
def test_loop_oracle(shape, with_offsets, power):
    logits, target, offsets = draw(shape)
    case = (logits, target, offsets if with_offsets else None, power)
    for found, expected in zip(run(*case), oracle(*case), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power", POWERS)
def test_gradcheck(power):
    logits, target, offsets = draw((2, 4, 3, 2))
    assert torch.autograd.gradcheck(lambda z: error_counts(z, target, offsets, power, VOID), logits.requires_grad_())


@settings(deadline=None, max_examples=40)
@given(
    classes=st.sampled_from([2, 3, 19]),
    size=st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6)),
    layout=st.sampled_from(["contiguous", "channels last", "cropped", "strided"]),
    void=st.sampled_from([0.0, 0.3, 1.0]),
    power=st.sampled_from(POWERS),
    seed=st.integers(0, 1000),
)
def test_layout_order_of_classes_and_constants_do_not_matter(classes, size, layout, void, power, seed):
    samples, height, width = size
    logits, target, offsets = draw((samples, classes, height, width), seed, void=void)
    expected, gradient = run(logits, target, offsets, power)
    if layout == "channels last":
        other = logits.to(memory_format=torch.channels_last)
    elif layout == "cropped":
        other = torch.nn.functional.pad(logits, (1, 2, 3, 1))[..., 3 : 3 + height, 1 : 1 + width]
    elif layout == "strided":
        other = logits.repeat_interleave(2, dim=-1)[..., ::2]
    else:
        other = logits + 7 * torch.arange(width)  # the same for all classes of a pixel
    for found, wanted in zip(run(other, target, offsets, power), (expected, gradient), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    relabelled = torch.where(target == VOID, VOID, order.argsort()[target.clamp(max=classes - 1)])
    found, _ = run(logits[:, order], relabelled, tuple(o[order] for o in offsets), power)
    torch.testing.assert_close(found, expected[:, order], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("elements", [1, 50, 400])
@pytest.mark.parametrize("shape", [(5, 3, 7, 4), (2, 4, 9), (3, 2, 2, 3, 5)])
def test_tiles_change_nothing(monkeypatch, elements, shape):
    case = (*draw(shape), 0.5)
    expected = run(*case)
    monkeypatch.setattr(counts, "_TILE", elements)
    for found, wanted in zip(run(*case), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_junk_under_void_pixels_and_nan_elsewhere(junk):
    logits, target, offsets = draw((2, 4, 5, 6))
    expected = run(logits, target, offsets, 0.5)
    changed = logits.masked_fill((target == VOID).unsqueeze(1), junk)
    for found, wanted in zip(run(changed, target, offsets, 0.5), expected, strict=True):
        assert torch.equal(found, wanted)
    changed[0, 0].masked_fill_(target[0] != VOID, torch.nan)
    assert run(changed, target, offsets, 0.5)[0][1:].isnan().any()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types(dtype, power):
    """Counts in float32 of the logits as they are; the gradient is off by its own rounding and that of 1 - p."""
    logits, target, offsets = draw((2, 5, 6, 7), dtype=dtype)
    found, gradient = run(logits, target, offsets, power)
    expected, wanted = oracle(logits, target, offsets, power)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("power", POWERS)
def test_extreme_logits_stay_finite(power):
    logits, target, offsets = draw((2, 4, 5, 6), dtype=torch.float32)
    found, gradient = run(1e4 * logits.sign(), target, offsets, power)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    found, gradient = run(1e4 * logits, target, None, power)  # as good as certain: errors are 0 or 1
    labels, preds = target[target != VOID], logits.argmax(1)[target != VOID]
    for k in range(4):
        assert found[:, k].tolist() == [
            (labels == k).sum(),
            ((labels == k) & (preds != k)).sum(),
            ((labels != k) & (preds == k)).sum(),
        ]
    assert gradient.abs().max() < 1e-3


def test_nothing_of_the_size_of_the_logits_is_kept():
    logits, target, _ = draw((2, 4, 5, 6))
    z = logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        error_counts(z, target, None, 0.5, VOID)
    assert {t.data_ptr() for t in kept if t.numel() >= target.numel()} == {z.data_ptr(), target.data_ptr()}


def test_backward_twice_but_no_second_derivative():
    logits, target, offsets = draw((1, 3, 2, 2))
    z = logits.requires_grad_()
    total = error_counts(z, target, offsets, 0.5, VOID)[1:].sum()
    first, second = (torch.autograd.grad(total, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="create_graph=True: counts of errors have no second derivative"):
        torch.autograd.grad(total, z, create_graph=True)


@pytest.mark.parametrize("aggregation", ["dice", "jaccard"])
def test_ratio_of_powers(aggregation):
    """The loss with q = 1/2 by sums of square roots of probabilities."""
    logits, target, _ = draw((2, 4, 5, 6))
    loss = MarginCalibrationLoss(
        4, scheme="none", margin="soft", surrogate="sigmoid", aggregation=aggregation, classes="all", smooth=0.25, power=0.5
    ).calibrate([4, 3, 2, 1])
    p = logits.softmax(1)
    ratios = []
    for k in range(4):
        mine, others = target == k, (target != k) & (target != VOID)
        hits = float(p[:, k][mine].sqrt().sum())
        alarms = float((1 - (1 - p[:, k][others]).sqrt()).sum())
        n = int(mine.sum())
        if aggregation == "jaccard":
            ratios.append((hits + 0.25) / (n + alarms + 0.25))
        else:
            ratios.append((2 * hits + 0.25) / (n + hits + alarms + 0.25))
    assert float(loss(logits, target)) == pytest.approx(1 - sum(ratios) / 4, rel=1e-12)


def test_power_one_is_soft_dice_with_its_gradient():
    logits, target, _ = draw((2, 4, 5, 6))
    options = {"margin": "soft", "surrogate": "sigmoid", "aggregation": "dice", "classes": "all", "smooth": 1.0}
    gradients = []
    for loss in (MarginCalibrationLoss(4, scheme="none", **options).calibrate([4, 3, 2, 1]), DiceLoss(classes="all")):
        z = logits.clone().requires_grad_()
        loss(z, target).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("power", "surrogate"), [(0.0, "sigmoid"), (1.5, "sigmoid"), (math.nan, "sigmoid"), (0.5, "log")])
def test_power_out_of_range(power, surrogate):
    with pytest.raises(ValueError, match="power: found .* expected 0 < power <= 1, and 1 unless the surrogate is 'sigmoid'"):
        MarginCalibrationLoss(3, surrogate=surrogate, power=power)


@pytest.mark.parametrize("power", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (9.0, 0.5, 3.0, 0.4)])
def test_power_does_not_move_the_decision_between_two_classes(power, weights):
    """Least risk over p of a pixel that has the first class with probability h: below, at and above p = 1/2."""
    miss_1, miss_2, alarm_1, alarm_2 = weights
    turn = (miss_2 + alarm_1) / (miss_1 + alarm_2 + miss_2 + alarm_1)
    p = torch.arange(1, 1000, dtype=torch.float64) / 1000
    z = torch.stack([p.log(), (1 - p).log()], 1)
    risks = []
    for label in (0, 1):
        each = [error_counts(row[None], torch.tensor([label]), None, power, VOID) for row in z]
        risks.append(
            torch.stack([c[1] @ c.new_tensor([miss_1, miss_2]) + c[2] @ c.new_tensor([alarm_1, alarm_2]) for c in each])
        )
    for h, best in ((turn - 0.02, -1), (turn, 0), (turn + 0.02, 1)):
        least = float(p[(h * risks[0] + (1 - h) * risks[1]).argmin()])
        assert (abs(least - 0.5) < 1e-9) if best == 0 else (least - 0.5) * best > 0
