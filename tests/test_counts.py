"""Soft counts and the region losses that use them: values and gradients against loops over pixels and classes."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcseg.kernels import fused_counts, soft_counts
from mcseg.losses import DiceLoss, JaccardLoss, TverskyLoss

VOID = 255
POWERS = [1.0, 0.5, 0.3]
each_backend = pytest.mark.parametrize("backend", ["fused", "reference"])


def draw(shape, seed=0, dtype=torch.float64, void=0.2, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    pixels = (shape[0], *shape[2:])
    target = torch.randint(shape[1], pixels, generator=generator)
    target[torch.rand(pixels, generator=generator) < void] = VOID
    return logits, target


def oracle(logits, target, power):
    """Compute counts and the gradient of their sum, with weights 1 + k of misses and (2 + k) / 3 of false alarms."""
    num_classes = logits.shape[1]
    rows = logits.double().movedim(1, -1).reshape(-1, num_classes).tolist()
    counts = [[0.0] * num_classes for _ in range(3)]
    gradients = []
    for z, y in zip(rows, target.flatten().tolist(), strict=True):
        gradient = [0.0] * num_classes
        for k in range(num_classes) if y != VOID else ():
            others = [j for j in range(num_classes) if j != k]
            top = max(z[j] for j in others)
            parts = [math.exp(z[j] - top) for j in others]
            log_odds = z[k] - top - math.log(sum(parts))
            r = 1 / (1 + math.exp(log_odds if k == y else -log_odds))
            counts[0][k] += k == y
            counts[1 if k == y else 2][k] += 1 - (1 - r) ** power
            slope = power * (1 - r) ** power * r * (-(1 + k) if k == y else (2 + k) / 3)  # in the log-odds
            gradient[k] += slope
            for j, part in zip(others, parts, strict=True):
                gradient[j] -= slope * part / sum(parts)
        gradients.append(gradient)
    shape = (logits.shape[0], *logits.shape[2:], num_classes)
    return torch.tensor(counts, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64).view(shape).movedim(-1, 1)


def run(logits, target, power, backend="fused"):
    z = logits.detach().requires_grad_()
    counts = soft_counts(z, target, power=power, backend=backend)
    classes = torch.arange(logits.shape[1], device=z.device)
    (gradient,) = torch.autograd.grad((counts[1] * (1 + classes) + counts[2] * (2 + classes) / 3).sum(), z)
    assert gradient.dtype == logits.dtype
    return counts.detach(), gradient


@pytest.mark.parametrize("power", POWERS)
@each_backend
@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 4), (1, 3, 5, 2), (2, 19, 4, 3), (3, 5, 7), (1, 4, 2, 3, 2), (9, 6), (2, 65, 3)]
)
def test_counts_and_gradients_against_a_loop(shape, backend, power):
    logits, target = draw(shape)
    case = (logits, target, power)
    for actual, expected in zip(run(*case, backend), oracle(*case), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power", POWERS)
def test_gradcheck(power):
    logits, target = draw((2, 4, 3, 2))
    z = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: soft_counts(z, target, power=power), z)
    assert torch.autograd.gradgradcheck(lambda z: soft_counts(z, target, power=power, backend="reference"), z)


def compute_exactly(z, label, power, misses, alarms):
    """Compute the errors of one pixel and the gradient of their weighted sum with 80 digits."""
    with localcontext() as context:
        context.prec, context.Emin = 80, -(10**9)
        q, z = Decimal(power), [Decimal(value) for value in z]
        e = [(value - max(z)).exp() for value in z]
        p = [part / sum(e) for part in e]
        rest = [sum(e[j] for j in range(len(e)) if j != k) / sum(e) for k in range(len(e))]
        errors = [1 - (p[k] if k == label else rest[k]) ** q for k in range(len(e))]
        slopes = []  # with respect to p
        for k in range(len(e)):
            kept, weight = (p[k], -Decimal(misses[k])) if k == label else (rest[k], Decimal(alarms[k]))
            slopes.append(weight * q * kept ** (q - 1))
        gradient = [sum(s * p[k] * (rest[k] if j == k else -p[j]) for k, s in enumerate(slopes)) for j in range(len(e))]
        return [float(error) for error in errors], [float(value) for value in gradient]


@each_backend
@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("gap", [0.0, 3.0, 18.0, 40.0, 80.0, 120.0])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.1])
def test_confident_pixels_keep_their_gradient_in_float32(power, gap, label, backend):
    """Test correct and wrong predictions whose 1 - p is far below the rounding error of p."""
    z, misses, alarms = [gap, 0.0, -1.5], [1.0, 3.0, 0.5], [2.0, 1.0, 4.0]
    errors, expected = compute_exactly(z, label, power, misses, alarms)
    logits = torch.tensor([z]).requires_grad_()
    counts = soft_counts(logits, torch.tensor([label]), power=power, backend=backend)
    (gradient,) = torch.autograd.grad((counts[1:] * torch.tensor([misses, alarms])).sum(), logits)
    actual = [float(counts[1 if k == label else 2][k].detach()) for k in range(3)]
    assert actual == pytest.approx(errors, rel=1e-6, abs=2e-7)
    largest = max(map(abs, expected))
    assert gradient[0].tolist() == pytest.approx(expected, rel=3e-6, abs=max(3e-7 * largest, 1e-37))


@each_backend
@pytest.mark.parametrize("power", POWERS)
def test_a_shift_of_all_logits_does_not_matter(power, backend):
    logits, target = draw((2, 4, 5, 6), dtype=torch.float32)
    logits = (logits * 64).round() / 64  # so that adding 1e4 is exact
    for actual, expected in zip(run(logits + 1e4, target, power, backend), run(logits, target, power, backend), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    classes=st.sampled_from([2, 3, 19]),
    size=st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6)),
    layout=st.sampled_from(["contiguous", "channels last", "cropped", "strided"]),
    void=st.sampled_from([0.0, 0.3, 1.0]),
    power=st.sampled_from(POWERS),
    seed=st.integers(0, 1000),
)
def test_layout_and_order_of_classes_do_not_matter(classes, size, layout, void, power, seed):
    samples, height, width = size
    logits, target = draw((samples, classes, height, width), seed, void=void)
    expected, gradient = run(logits, target, power)
    if layout == "channels last":
        changed = logits.to(memory_format=torch.channels_last)
    elif layout == "cropped":
        changed = torch.nn.functional.pad(logits, (1, 2, 3, 1))[..., 3 : 3 + height, 1 : 1 + width]
    elif layout == "strided":
        changed = logits.repeat_interleave(2, dim=-1)[..., ::2]
    else:
        changed = logits + 7 * torch.arange(width)  # the same for all classes of a pixel
    counts, changed_gradient = run(changed, target, power)
    torch.testing.assert_close(counts, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(changed_gradient, gradient, rtol=1e-9, atol=1e-11)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    relabelled = torch.where(target == VOID, VOID, order.argsort()[target.clamp(max=classes - 1)])
    reordered, _ = run(logits[:, order], relabelled, power)
    torch.testing.assert_close(reordered, expected[:, order], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("elements", [1, 50, 400])
@pytest.mark.parametrize("shape", [(5, 3, 7, 4), (2, 4, 9), (3, 2, 2, 3, 5)])
def test_tiling_does_not_change_the_result(monkeypatch, elements, shape):
    case = (*draw(shape), 0.5)
    untiled = run(*case)
    monkeypatch.setattr(fused_counts, "_TILE", elements)
    for actual, expected in zip(run(*case), untiled, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@each_backend
@pytest.mark.parametrize("invalid", [torch.nan, torch.inf, -torch.inf])
def test_invalid_logits_matter_only_at_labelled_pixels(invalid, backend):
    logits, target = draw((2, 4, 5, 6))
    unchanged = run(logits, target, 0.5, backend)
    changed = logits.masked_fill((target == VOID).unsqueeze(1), invalid)
    for actual, expected in zip(run(changed, target, 0.5, backend), unchanged, strict=True):
        assert torch.equal(actual, expected)
    changed[0, 0].masked_fill_(target[0] != VOID, torch.nan)
    assert run(changed, target, 0.5, backend)[0][1:].isnan().any()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_and_single_precision(dtype, power):
    """Counts are computed in float32; the gradient has only the error of rounding to the dtype of the logits."""
    logits, target = draw((2, 5, 6, 7), dtype=dtype)
    counts, gradient = run(logits, target, power)
    expected, expected_gradient = oracle(logits, target, power)
    assert counts.dtype == torch.float32
    torch.testing.assert_close(counts.double(), expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@each_backend
@pytest.mark.parametrize("power", POWERS)
def test_extreme_logits_stay_finite(power, backend):
    logits, target = draw((2, 4, 5, 6), dtype=torch.float32)
    counts, gradient = run(1e4 * logits.sign(), target, power, backend)
    assert counts.isfinite().all()
    assert gradient.isfinite().all()
    counts, gradient = run(1e4 * logits, target, power, backend)  # the errors of certain predictions are 0 or 1
    labels, preds = target[target != VOID], logits.argmax(1)[target != VOID]
    for k in range(4):
        assert counts[:, k].tolist() == [
            (labels == k).sum(),
            ((labels == k) & (preds != k)).sum(),
            ((labels != k) & (preds == k)).sum(),
        ]
    assert gradient.abs().max() < 1e-3


def test_backward_needs_no_copy_of_the_logits():
    logits, target = draw((2, 4, 5, 6))
    z = logits.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        soft_counts(z, target, power=0.5)
    assert {t.data_ptr() for t in saved if t.numel() >= target.numel()} == {z.data_ptr(), target.data_ptr()}


def test_backward_twice_but_no_second_derivative():
    logits, target = draw((1, 3, 2, 2))
    z = logits.requires_grad_()
    total = soft_counts(z, target, power=0.5)[1:].sum()
    first, second = (torch.autograd.grad(total, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match='create_graph=True: backend "fused" has no second derivative'):
        torch.autograd.grad(total, z, create_graph=True)


def ratio(kind, n, hits, alarms, smooth):
    """Compute the ratio of one class from soft counts by the formula of its paper."""
    if kind == "dice":
        return (2 * hits + smooth) / (n + hits + alarms + smooth)
    if kind == "jaccard":
        return (hits + smooth) / (n + alarms + smooth)
    return (hits + smooth) / (hits + 0.3 * alarms + 0.7 * (n - hits) + smooth)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("kind", ["dice", "jaccard", "tversky"])
def test_ratios_and_class_statistics_against_a_loop(kind, power, per_image):
    """Compare losses and class statistics with sums of powers of probabilities, class by class."""
    logits, target = draw((2, 4, 5, 6))
    make = {"dice": DiceLoss, "jaccard": JaccardLoss, "tversky": TverskyLoss}[kind]
    loss = make(classes="all", smooth=0.25, power=power, per_image=per_image)
    p = logits.softmax(1)
    ratios, rates = [], []
    for image in (slice(0, 1), slice(1, 2)) if per_image else (slice(None),):
        for k in range(4):
            labelled, others = target[image] == k, (target[image] != k) & (target[image] != VOID)
            hits = float((p[image, k][labelled] ** power).sum())
            alarms = float((1 - (1 - p[image, k][others]) ** power).sum())
            n = int(labelled.sum())
            ratios.append(ratio(kind, n, hits, alarms, 0.25))
            rates.append(((n - hits) / n, alarms / int(others.sum())))
    assert float(loss(logits, target)) == pytest.approx(1 - sum(ratios) / len(ratios), rel=1e-12)
    means = [sum(ratios[k::4]) / len(ratios[k::4]) for k in range(4)]
    assert loss.class_statistics["ratio"].tolist() == pytest.approx(means, rel=1e-12)
    if not per_image:
        assert loss.class_statistics["miss_rate"].tolist() == pytest.approx([miss for miss, _ in rates], rel=1e-12)
        assert loss.class_statistics["false_alarm_rate"].tolist() == pytest.approx([alarm for _, alarm in rates], rel=1e-12)


@pytest.mark.parametrize("power", [0.0, 1.5, math.nan, -1.0])
@pytest.mark.parametrize("kind", [DiceLoss, JaccardLoss, TverskyLoss])
def test_power_out_of_range_is_refused(kind, power):
    with pytest.raises(ValueError, match="power: found .* expected 0 < power <= 1"):
        kind(power=power)


@pytest.mark.parametrize("power", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (9.0, 0.5, 3.0, 0.4)])
def test_power_does_not_move_the_decision_between_two_classes(power, weights):
    """The p that minimises the risk of a pixel of class 1 with probability h crosses 1/2 at the same h for every power."""
    miss_1, miss_2, alarm_1, alarm_2 = weights
    threshold = (miss_2 + alarm_1) / (miss_1 + alarm_2 + miss_2 + alarm_1)
    p = torch.arange(1, 1000, dtype=torch.float64) / 1000
    z = torch.stack([p.log(), (1 - p).log()], 1)
    risks = []
    for label in (0, 1):
        counts = torch.stack([soft_counts(row[None], torch.tensor([label]), power=power) for row in z])
        weights_of_misses, weights_of_alarms = p.new_tensor([[miss_1, miss_2], [alarm_1, alarm_2]])
        risks.append(counts[:, 1] @ weights_of_misses + counts[:, 2] @ weights_of_alarms)
    for h, side in ((threshold - 0.02, -1), (threshold, 0), (threshold + 0.02, 1)):
        best = float(p[(h * risks[0] + (1 - h) * risks[1]).argmin()])
        assert (abs(best - 0.5) < 1e-9) if side == 0 else (best - 0.5) * side > 0
