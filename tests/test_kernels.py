"""The loss per pixel: both backends against a loop after the paper and against each other; threads and tiles."""

import math
import subprocess
import sys
import threading
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcseg.kernels import fused_loss, pixel_loss, reference
from mcseg.kernels.tiles import on_threads, tiles

BACKENDS = ["fused", "reference"]
VOID = 255


def oracle(logits, target, foreground, background, weight):
    """Compute loss and gradient of each pixel by the definition, one class at a time, in Python floats."""
    num_classes = logits.shape[1]
    rows = logits.detach().double().movedim(1, -1).reshape(-1, num_classes).tolist()
    losses, gradients = [], []
    for z, y in zip(rows, target.flatten().tolist(), strict=True):
        loss, gradient = 0.0, [0.0] * num_classes
        for k in range(num_classes) if y != VOID else ():
            rival = max((j for j in range(num_classes) if j != k), key=lambda j: (z[j], -j))
            sign, factor, offset = (-1, weight, foreground[k]) if k == y else (1, 1.0, background[k])
            t = offset + sign * (z[k] - z[rival])
            loss += factor * (max(t, 0.0) + math.log1p(math.exp(-abs(t)))) / num_classes
            sigmoid = 1 / (1 + math.exp(-t)) if t > 0 else math.exp(t) / (1 + math.exp(t))
            gradient[k] += sign * factor * sigmoid / num_classes
            gradient[rival] -= sign * factor * sigmoid / num_classes
        losses.append(loss)
        gradients.append(gradient)
    shape = (logits.shape[0], *logits.shape[2:], num_classes)
    losses = torch.tensor(losses, dtype=torch.float64).view(target.shape)
    return losses, torch.tensor(gradients, dtype=torch.float64).view(shape).movedim(-1, 1)


def run(backend, logits, target, foreground, background, weight=3.0, upstream=None, ignore_index=VOID):
    """Compute the loss per pixel and the gradient; `upstream` is the gradient of each pixel's loss, all ones if None."""
    z = logits.detach().requires_grad_()
    loss = pixel_loss(
        z, target, foreground, background, foreground_weight=weight, ignore_index=ignore_index, backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, z, torch.ones_like(loss) if upstream is None else upstream)
    assert loss.shape == target.shape
    assert gradient.shape == logits.shape
    assert gradient.dtype == logits.dtype
    return loss.detach(), gradient


def draw(shape, seed=0, dtype=torch.float64, scale=3.0, void=0.2):
    generator = torch.Generator().manual_seed(seed)
    num_classes = shape[1]
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    pixels = (shape[0], *shape[2:])
    target = torch.randint(num_classes, pixels, generator=generator)
    target[torch.rand(pixels, generator=generator) < void] = VOID if num_classes <= VOID else -1
    foreground, background = (torch.rand(2, num_classes, generator=generator, dtype=torch.float64) * 2).unbind()
    return logits, target, foreground, background


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 4), (1, 3, 5, 2), (2, 19, 4, 3), (3, 5, 7), (1, 4, 2, 3, 2), (9, 6), (1, 150, 2, 2), (2, 65, 3)]
)
@pytest.mark.parametrize("weight", [0.0, 1.0, 19.0])
def test_loss_and_gradient_equal_a_loop(backend, shape, weight):
    case = draw(shape)
    for actual, expected in zip(run(backend, *case, weight), oracle(*case, weight), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_equal_a_loop(backend):
    # the logits are -1, 0 or 1, so nearly all pixels have several largest logits or several runners-up
    for num_classes in (2, 3, 5, 19):
        logits, target, foreground, background = draw((2, num_classes, 8, 9), seed=num_classes)
        case = (logits.sign() * (logits.abs() > 2), target, foreground, background)
        for actual, expected in zip(run(backend, *case), oracle(*case, 3.0), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thousand_classes(backend):
    logits, target, foreground, background = draw((1, 1000, 2, 3))
    void = target == -1
    loss, gradient = run(backend, logits, target, foreground, background, ignore_index=-1)
    expected = oracle(logits, target.masked_fill(void, VOID), foreground, background, 3.0)
    kept = ~void & (target != VOID)  # label 255 is a class here, but void in the oracle
    assert kept.any()
    assert void.any()
    torch.testing.assert_close(loss[kept], expected[0][kept], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient.movedim(1, -1)[kept], expected[1].movedim(1, -1)[kept], rtol=1e-12, atol=1e-14)
    assert loss[void].eq(0).all()
    assert gradient.movedim(1, -1)[void].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 2, 2, 3), (1, 5, 3), (2, 19, 2, 1)])
def test_gradcheck(backend, shape):
    logits, target, foreground, background = draw(shape)

    def loss(z):
        return pixel_loss(z, target, foreground, background, foreground_weight=2.5, ignore_index=VOID, backend=backend)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(
        st.integers(0, 3), st.sampled_from([2, 3, 5, 19, 67]), st.lists(st.integers(1, 6), min_size=1, max_size=3)
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    labels=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]),
    layout=st.sampled_from(["contiguous", "channels last", "cropped", "strided", "expanded"]),
    void=st.sampled_from(["none", "some", "rows", "all"]),
    ties=st.booleans(),
    offsets=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_fused_equals_the_reference(shape, dtype, labels, layout, void, ties, offsets, seed):
    samples, num_classes, spatial = shape
    shape = (samples, num_classes, *spatial)
    logits, target, foreground, background = draw(shape, seed, dtype, void=0.3 if void == "some" else 0.0)
    if ties:
        logits = logits.round()
    if void in ("rows", "all"):
        target[:, : 1 if void == "rows" else None] = VOID
    if layout == "channels last":
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "cropped":
        logits = torch.nn.functional.pad(logits, (1, 2))[..., 1:-2]
    elif layout == "strided":
        logits = logits.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "expanded":
        logits = logits[:1].expand(shape) if samples else logits
    case = (logits, target.to(labels), foreground * offsets, background * offsets)
    upstream = torch.randn(target.shape, dtype=dtype)
    references = run("reference", *case, upstream=upstream)
    before = logits.clone()
    results = run("fused", *case, upstream=upstream)
    assert logits.equal(before)
    # a sum of C rounded terms has an error of about C/2 units in the last place of the largest term
    tolerance = 8 * torch.finfo(dtype).eps
    for actual, expected in zip(results, references, strict=True):
        assert actual.dtype == dtype
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(BACKENDS), st.sampled_from([2, 3, 7]), st.integers(0, 1000))
def test_shift_per_pixel_and_order_of_classes_do_not_matter(backend, num_classes, seed):
    logits, target, foreground, background = draw((2, num_classes, 3, 4), seed)
    loss, gradient = run(backend, logits, target, foreground, background)

    shift = torch.randint(-50, 50, (2, 1, 3, 4))
    shifted = run(backend, logits + shift, target, foreground, background)
    torch.testing.assert_close(shifted, (loss, gradient), rtol=1e-11, atol=1e-12)

    order = torch.randperm(num_classes)  # new class i is old class order[i]
    relabelled = torch.where(target == VOID, VOID, order.argsort()[target.clamp(max=num_classes - 1)])
    permuted = run(backend, logits[:, order], relabelled, foreground[order], background[order])
    torch.testing.assert_close(permuted, (loss, gradient[:, order]), rtol=1e-12, atol=1e-14)
    assert gradient.sum(dim=1).abs().max() < 1e-13  # because a shift per pixel does not change the loss


@pytest.mark.parametrize("name", ["channels_last", "channels_last_3d"])
def test_gradient_has_the_memory_format_of_the_logits(name):
    shape = (2, 5, 4, 6) if name == "channels_last" else (2, 5, 3, 4, 6)
    case = draw(shape)
    memory_format = getattr(torch, name)
    expected = run("fused", *case)
    loss, gradient = run("fused", case[0].to(memory_format=memory_format), *case[1:])
    assert gradient.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close((loss, gradient), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("elements", [1, 40, 100, 500])
@pytest.mark.parametrize("shape", [(3, 5, 7, 4), (4, 5, 11), (3, 5, 3, 2, 2)])
def test_tiling_does_not_change_the_result(monkeypatch, elements, shape):
    case = draw(shape)
    untiled = run("fused", *case)
    monkeypatch.setattr(fused_loss, "_TILE", elements)
    times_covered = torch.zeros(case[1].shape, dtype=torch.int64)
    parts = list(tiles(case[0], elements))
    for samples, rows in parts:
        times_covered[samples, rows] += 1
    assert times_covered.eq(1).all()
    assert len(parts) > 1 or elements == 500
    # vector instructions and the scalar loop for the remaining elements differ in the last place
    torch.testing.assert_close(run("fused", *case), untiled, rtol=1e-13, atol=1e-15)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_thread_whose_first_tile_is_not_its_largest(monkeypatch, three_threads):
    case = draw((3, 5, 3, 4))
    untiled = run("fused", *case)
    monkeypatch.setattr(
        fused_loss, "_TILE", 2 * 5 * 4
    )  # rows 0-1 and row 2 of each sample: the second thread gets both sizes
    torch.testing.assert_close(run("fused", *case), untiled, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    logits, target, foreground, background = draw((2, 19, 16, 16), dtype=dtype, scale=5.0)
    upstream = torch.rand(target.shape) / 100
    case = (target, foreground, background)
    exact = run("reference", logits.double(), *case, upstream=upstream.double())
    references = run("reference", logits, *case, upstream=upstream)
    results = run("fused", logits, *case, upstream=upstream)
    assert results[0].dtype == torch.float32
    # arithmetic is in float32; a bfloat16 gradient is rounded twice, when it is saved and when it is scaled
    allowed = (4 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6)
    for actual, expected, truth, tolerance in zip(results, references, exact, allowed, strict=True):
        error, reference_error = (actual - truth).abs(), (expected - truth).abs()
        assert (error <= reference_error + tolerance * truth.abs() + 1e-7 * truth.abs().max()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_with_large_weight_and_small_upstream(backend):
    logits, target, foreground, background = draw((1, 3, 4, 4), dtype=torch.float16)
    case = (target, foreground, background, 1e7)
    _, gradient = run(backend, logits, *case, upstream=torch.full(target.shape, 1e-7))
    exact = oracle(logits, *case)[1] * 1e-7
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(backend, dtype):
    largest = torch.finfo(torch.float16).max if dtype == torch.float16 else 1e4
    logits = torch.tensor([[largest, -largest, 0], [-largest] * 3, [0, largest, largest]], dtype=dtype)
    loss, gradient = run(backend, logits, torch.tensor([1, 0, 2]), torch.ones(3), torch.ones(3))
    expected = oracle(logits, torch.tensor([1, 0, 2]), [1.0] * 3, [1.0] * 3, 3.0)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=2**-7 if dtype != torch.float32 else 1e-6, atol=1e-7)


def test_small_losses_keep_their_digits():
    # every term is about exp(-30); in float32, 1 + exp(-30) rounds to 1, and its logarithm to 0
    logits = torch.zeros(1, 19, 1)
    logits[:, 4] = 30.0
    for backend in BACKENDS:
        loss, _ = run(backend, logits, torch.tensor([[4]]), torch.zeros(19), torch.zeros(19))
        assert loss.item() == pytest.approx((3 + 18) * math.exp(-30) / 19, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("invalid", [math.nan, math.inf, -math.inf])
def test_invalid_logits_matter_only_at_labelled_pixels(backend, invalid):
    logits, target, foreground, background = draw((2, 4, 3, 5))
    void = target == VOID
    expected = run(backend, logits, target, foreground, background)
    changed = logits.masked_fill(void.unsqueeze(1), invalid)
    loss, gradient = run(backend, changed, target, foreground, background)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    assert loss[void].eq(0).all()
    assert gradient.movedim(1, -1)[void].eq(0).all()

    n, h, w = torch.nonzero(~void)[0].tolist()
    logits[n, 2, h, w] = math.nan
    loss, gradient = run(backend, logits, target, foreground, background)
    assert loss[n, h, w].isnan()
    assert loss.isnan().sum() == 1
    assert gradient.isnan().any(dim=1).sum() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_void_and_empty(backend):
    logits, _, foreground, background = draw((2, 4, 3, 5))
    target = torch.full((2, 3, 5), VOID)
    loss, gradient = run(backend, logits, target, foreground, background)
    assert loss.eq(0).all()
    assert gradient.eq(0).all()
    loss, gradient = run(backend, logits[:0], target[:0], foreground, background)
    assert loss.sum() == 0
    assert gradient.shape == (0, 4, 3, 5)


def test_fused_saves_one_gradient_until_backward_and_none_without_grad():
    for dtype, saved in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ):
        case = draw((2, 4, 3, 5), dtype=dtype)
        logits, *rest = case
        loss = pixel_loss(logits.requires_grad_(), *rest, foreground_weight=3.0, ignore_index=VOID)
        gradient = loss.grad_fn.gradient
        assert (gradient.shape, gradient.dtype) == (logits.shape, saved)
        loss.sum().backward()
        assert loss.grad_fn.gradient is None
        logits.requires_grad_(False)
    logits, *rest = case
    assert not pixel_loss(logits, *rest, foreground_weight=3.0, ignore_index=VOID).requires_grad
    with torch.no_grad():
        loss = pixel_loss(logits.requires_grad_(), *rest, foreground_weight=3.0, ignore_index=VOID)
    assert not loss.requires_grad
    assert torch.equal(loss, run("fused", *case)[0])


def test_backward_twice_but_no_second_derivative():
    logits, target, foreground, background = draw((1, 3, 2, 2))
    z = logits.requires_grad_()
    loss = pixel_loss(z, target, foreground, background, foreground_weight=3.0, ignore_index=VOID).sum()
    first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match='no second derivative; use backend="reference"'):
        torch.autograd.grad(loss, z, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_outside_the_classes(backend):
    logits, target, foreground, background = draw((1, 4, 2, 3), void=0.0)
    for label, dtype in ((4, torch.uint8), (-1, torch.int64), (254, torch.uint8)):
        target[0, 1, 2] = label
        with pytest.raises(ValueError, match=rf"found label {label}, expected 0..3 or ignore_index 255; map labels"):
            run(backend, logits, target.to(dtype), foreground, background)
    # in uint8, an ignore_index of -100 would wrap to 156
    target[0, 1, 2] = 156
    with pytest.raises(ValueError, match="found label 156"):
        run(backend, logits, target.to(torch.uint8), foreground, background, ignore_index=-100)
    # the ignore_index may be a class
    target[0, 1, 2] = 0
    loss, _ = run(backend, logits, target, foreground, background, ignore_index=0)
    assert torch.equal(loss == 0, target == 0)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend: found 'triton2', expected one of 'auto', 'fused', 'reference'"):
        run("triton2", *draw((1, 2, 2)))


def test_each_part_runs_once_and_its_operations_in_one_thread(three_threads):
    times_run = torch.zeros(7, dtype=torch.int64)
    calls = []

    def function(parts):
        calls.append((len(parts), torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        for part in parts:
            times_run[part] += 1

    on_threads(function, range(7))
    assert times_run.eq(1).all()
    assert sorted(calls) == [(2, 1, False, False), (2, 1, False, False), (3, 1, False, False)]
    assert torch.get_num_threads() == 3
    threads_elsewhere = []
    thread = threading.Thread(target=lambda: threads_elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert threads_elsewhere == [3]
    with torch.inference_mode():
        on_threads(function, range(7))
    assert calls[-1][3]
    on_threads(function, [6])
    assert calls[-1][:2] == (1, 3)
    on_threads(function, [])
    assert len(calls) == 7
    with pytest.raises(ZeroDivisionError):
        on_threads(lambda parts: 1 / (parts[0] - 1), range(7))


FORKED = """
import os, torch
from mcseg.kernels.tiles import on_threads
torch.set_num_threads(2)
done = torch.zeros(2, 4)
def function(parts):
    for part in parts:
        done[1, part] = 1
on_threads(function, range(4))
child = os.fork()
if child == 0:
    done.zero_()
    on_threads(function, range(4))
    os._exit(int(done.sum()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_threads_of_a_forked_process():
    """A forked process starts its own threads; Lightning's notebook strategy may fork after losses were computed."""
    process = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=120)
    assert process.stdout.strip() == "4"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6))
def test_margins_and_probabilities_against_a_loop(z):
    """Compare class margins, and log p and log(1 - p) with those of 60 digits."""
    logits = torch.tensor(z, dtype=torch.float64)[None]
    margins = reference.class_margins(logits)[0].tolist()
    log_p, log_rest = (values[0].tolist() for values in reference.log_probabilities(logits))
    with localcontext() as context:
        context.prec = 60
        e = [Decimal(value).exp() for value in z]
        for k in range(len(z)):
            assert margins[k] == z[k] - max(value for j, value in enumerate(z) if j != k)
            rest = sum(e[j] for j in range(len(z)) if j != k)
            assert log_p[k] == pytest.approx(float((e[k] / sum(e)).ln()), rel=1e-12, abs=1e-300)
            assert log_rest[k] == pytest.approx(float((rest / sum(e)).ln()), rel=1e-12, abs=1e-300)
    assert margins[z.index(max(z))] >= 0
