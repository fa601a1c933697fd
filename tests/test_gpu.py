"""The Triton kernels against the reference in float64, on a GPU or, without one, in Triton's interpreter.

The error of a kernel may exceed the error of the reference in float32 by a small tolerance.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcseg.kernels import Upsampling, pixel_loss, soft_counts, weighted_pixel_loss
from mcseg.losses import DiceLoss, IoUWeightedLoss, MarginCalibrationLoss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
assert DEVICE == "cuda" or os.environ["TRITON_INTERPRET"] == "1"

NO_UPSAMPLING = {"height": 0, "width": 0, "align_corners": False}
POWERS = [1.0, 0.5, 0.3]
SHAPES = [(2, 5, 3, 7), (1, 2, 1, 1), (3, 4, 7), (9, 6), (1, 4, 2, 3, 5), (2, 19, 9, 15), (1, 24, 2, 3)]
SHAPES += [(1, 25, 2, 3), (1, 150, 2, 3), (1, 300, 2, 2)]  # too many classes for a thread's registers
each_power = pytest.mark.parametrize("power", POWERS)


def draw(shape, seed=0, dtype=torch.float32, void=0.2, offsets=1.0, ignore_index=255):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    pixels = (shape[0], *shape[2:])
    target = torch.randint(shape[1], pixels, generator=generator)
    target[torch.rand(pixels, generator=generator) < void] = ignore_index
    vectors = torch.rand(4, shape[1], generator=generator, dtype=torch.float64)
    vectors[:2] = offsets * (vectors[:2] - 0.2)
    return logits.to(DEVICE), target.to(DEVICE), vectors.to(DEVICE)


def run(logits, target, vectors, power, backend="triton", upstream=None, dtype=None, upsampling=None, ignore_index=255):
    """Compute the loss per pixel and its gradient, soft counts and the gradient of a weighted sum of them."""
    z = logits.detach().to(dtype or logits.dtype).requires_grad_()
    options = {"ignore_index": ignore_index, "backend": backend, "upsampling": upsampling}
    loss = weighted_pixel_loss(z, target, *vectors, **options)
    (gradient,) = torch.autograd.grad(loss, z, torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    counts = soft_counts(z, target, power=power, **options)
    (counts_gradient,) = torch.autograd.grad((counts[1:] * vectors[2:].to(counts.dtype)).sum(), z)
    assert loss.shape == target.shape
    assert gradient.shape == counts_gradient.shape == logits.shape
    assert gradient.dtype == counts_gradient.dtype == z.dtype
    return loss.detach(), gradient, counts.detach(), counts_gradient


def check_errors(case, power, upstream=None, tolerance=1e-6, upsampling=None, ignore_index=255):
    logits, target, vectors = case
    options = {"upstream": upstream, "upsampling": upsampling, "ignore_index": ignore_index}
    exact = run(logits.double(), target, vectors, power, "reference", **options)
    references = run(logits, target, vectors, power, "reference", dtype=torch.float32, **options)
    results = run(*case, power, "triton", **options)
    rounding = torch.finfo(logits.dtype).eps if logits.dtype != torch.float32 else 0.0
    # 1 - p loses digits if p is near 1; on a single pixel the reference may lose none by chance
    near_one = torch.finfo(torch.float32).eps
    names = ("loss", "gradient", "counts", "gradient of counts")
    for name, actual, reference, truth in zip(names, results, references, exact, strict=True):
        if truth.numel():
            scale = max(1e-3, float(truth.abs().max()))
            allowed = float((reference - truth).abs().max()) + (tolerance + rounding * ("gradient" in name)) * scale
            allowed += near_one if name == "counts" else 0.0
            assert float((actual - truth).abs().max()) <= allowed, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "power"), [(shape, power) for shape in SHAPES for power in POWERS if power == 0.5 or shape[1] < 100], ids=str
)
def test_errors_are_within_those_of_the_reference(shape, power):
    ignore_index = 255 if shape[1] <= 255 else -1
    case = draw(shape, ignore_index=ignore_index)
    check_errors(case, power, torch.rand(case[1].shape, device=DEVICE), ignore_index=ignore_index)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([2, 3, 7, 19]), st.integers(1, 6), st.integers(1, 9)),
    power=st.sampled_from(POWERS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "channels last", "cropped", "strided", "expanded"]),
    void=st.sampled_from([0.0, 0.3, 1.0]),
    offsets=st.sampled_from([0.0, 1.0, 30.0]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
@example((1, 2, 1, 1), 0.5, torch.float32, "contiguous", 0.0, 0.0, False, 168)
def test_layouts_dtypes_and_ties(shape, power, dtype, layout, void, offsets, ties, seed):
    logits, target, vectors = draw(shape, seed, dtype, void, offsets)
    logits = logits.sign() * (logits.abs() > 2) if ties else logits
    if layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last)
    elif layout == "cropped":
        logits = F.pad(logits, (1, 2, 3, 1))[..., 3 : 3 + shape[2], 1 : 1 + shape[3]]
    elif layout == "strided":
        logits = logits.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "expanded":
        logits = logits[:1].expand(shape)
    before = logits.clone()
    check_errors((logits, target, vectors), power)
    assert torch.equal(before, logits)


# sizes of the coarse logits, the upsampled logits and the target; few pixels, each takes milliseconds in the interpreter
UPSAMPLINGS = [
    ((2, 2), (6, 5), (6, 5), True, 1.0),
    ((3, 2), (5, 5), (5, 5), True, 0.5),
    ((2, 3), (4, 9), (3, 8), False, 0.5),
    ((1, 3), (4, 3), (4, 3), False, 1.0),
    ((4, 5), (3, 3), (3, 3), True, 0.3),
    ((2, 19), (2, 25), (2, 25), False, 0.5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("coarse", "full", "size", "align_corners", "power"), UPSAMPLINGS)
def test_upsampled_errors_are_within_those_of_the_reference(coarse, full, size, align_corners, power):
    logits, _, vectors = draw((2, 5, *coarse))
    _, target, _ = draw((2, 5, *size), seed=1)
    upstream = torch.rand(target.shape, device=DEVICE)
    upsampling = Upsampling(*full, align_corners)
    check_errors((logits, target, vectors), power, upstream=upstream, tolerance=3e-6, upsampling=upsampling)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dtype"), [("channels last", torch.bfloat16), ("cropped", torch.float16)])
def test_upsampled_errors_of_many_classes(layout, dtype):
    """Test more classes than fit into a tile of pixels or of cells, in 16 bits and with strides."""
    logits, _, vectors = draw((1, 70, 2, 2), dtype=dtype)
    _, target, _ = draw((1, 70, 2, 3), seed=1, ignore_index=-1)
    if layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last)
    else:
        logits = F.pad(logits, (1, 1, 2, 0))[..., 2:, 1:3]
    check_errors((logits, target, vectors), 0.5, tolerance=3e-6, upsampling=Upsampling(2, 3), ignore_index=-1)


@pytest.mark.slow
@each_power
def test_results_are_deterministic_and_gradients_have_the_logits_memory_format(power):
    logits, target, vectors = draw((2, 7, 9, 40))
    logits = logits.to(memory_format=torch.channels_last)
    first, second = (run(logits, target, vectors, power) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    coarse, upsampling = logits[..., :2, :2], Upsampling(3, 2)
    upsampled = [run(coarse, target[:, :3, :2], vectors, power, upsampling=upsampling) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*upsampled, strict=True))
    assert first[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@each_power
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from NumPy in the interpreter, for invalid logits
@pytest.mark.parametrize("invalid", [math.nan, math.inf])
def test_invalid_logits_matter_only_at_labelled_pixels(power, invalid):
    logits, target, vectors = draw((2, 4, 5, 6))
    expected = run(logits, target, vectors, power)
    changed = logits.masked_fill((target == 255).unsqueeze(1), invalid)
    assert all(torch.equal(a, b) for a, b in zip(run(changed, target, vectors, power), expected, strict=True))
    n, y, x = (target != 255).nonzero()[0].tolist()
    for k in range(4):
        changed = logits.clone()
        changed[n, k, y, x] = math.nan
        loss, gradient, counts, _ = run(changed, target, vectors, power)
        assert loss[n, y, x].isnan()
        assert gradient[n, :, y, x].isnan().any()
        assert int(loss.isnan().sum()) == 1
        assert counts[1:].isnan().any()


@each_power
def test_extreme_logits_void_images_and_empty_batches(power):
    logits, target, vectors = draw((2, 4, 5, 6))
    for value in run(1e4 * logits.sign(), target, vectors, power):
        assert value.isfinite().all()
    for value in run(logits, torch.full_like(target, 255), vectors, power):
        assert not value.any()
    empty = run(logits[:0], target[:0], vectors, power)
    assert not empty[2].any()


def test_label_that_is_not_a_class_gives_nan():
    """Labels are checked on the CPU; on a GPU the check would make the host wait, so the kernel returns NaN."""
    from mcseg.kernels import gpu

    logits, target, vectors = draw((1, 3, 2, 2), void=0.0)
    target[0, 1, 1] = 3
    vectors = [vector.float() for vector in vectors]
    z = logits.requires_grad_()
    loss, *_ = gpu.margin_loss(z, target, *vectors, weight=0.0, ignore_index=255, **NO_UPSAMPLING, differentiable=True)
    assert loss.isnan().tolist() == [[[False, False], [False, True]]]
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.isnan().any(1).tolist() == [[[False, False], [False, True]]]
    counts, *_ = gpu.soft_counts(z, target, power=0.5, ignore_index=255, **NO_UPSAMPLING, differentiable=True)
    assert counts[1:].isnan().any()
    (gradient,) = torch.autograd.grad(counts[1:].sum(), z)
    assert gradient.isnan().any(1).tolist() == [[[False, False], [False, True]]]


@pytest.mark.parametrize(
    "make",
    [
        lambda backend: MarginCalibrationLoss(4, "miou", backend=backend).calibrate([9000, 700, 250, 50]),
        lambda backend: IoUWeightedLoss(4, backend=backend).calibrate([9000, 700, 250, 50]),
        lambda backend: DiceLoss(power=0.5, classes="all", backend=backend),
    ],
    ids=["margins", "iou weights", "dice"],
)
def test_objectives_equal_those_of_the_reference(make):
    logits, target, _ = draw((2, 4, 6, 7))
    results = []
    for backend in ("triton", "reference"):
        loss = make(backend).to(DEVICE)
        z = logits.clone().requires_grad_()
        value = loss(z, target)
        value.backward()
        results.append((value.detach(), z.grad))
    (value, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)
    assert gradient.abs().max() > 1e-4


def test_pixel_loss_equals_the_fused_one():
    logits, target, vectors = draw((2, 19, 5, 6))
    actual, expected = (
        pixel_loss(logits.to(dtype), target, *vectors[:2], foreground_weight=3.0, ignore_index=255, backend=backend)
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "fused"))
    )
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised inside opcheck
def test_registered_operators_pass_opcheck():
    from mcseg.kernels import gpu

    for classes in (3, 30):  # in registers, and too many for them
        logits, target, vectors = draw((1, classes, 2, 3))
        vectors = [vector.float() for vector in vectors]
        z = logits.requires_grad_()
        options = {"ignore_index": 255, **NO_UPSAMPLING, "differentiable": True}
        torch.library.opcheck(gpu.margin_loss, (z, target, *vectors), {"weight": 0.0, **options})
        torch.library.opcheck(gpu.margin_loss, (z, target, *vectors[:3], None), {"weight": 0.5, **options})
        torch.library.opcheck(gpu.soft_counts, (z, target), {"power": 0.5, **options})


def test_loss_compiles_in_one_graph():
    logits, target, _ = draw((2, 4, 6, 7))
    loss = DiceLoss(power=0.5, backend="triton")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        z = logits.clone().requires_grad_()
        function(z, target).backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)


def test_float64_is_refused():
    logits, target, vectors = draw((1, 3, 2, 2))
    with pytest.raises(
        ValueError, match="backend: found 'triton' with torch.float64 .*, expected logits of at most 32 bits"
    ):
        weighted_pixel_loss(logits.double(), target, *vectors, ignore_index=255, backend="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 20 GB")
def test_more_elements_than_int32_can_index():
    logits = torch.zeros(1, 33, 8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    target = torch.full((1, 8192, 8192), 32, device=DEVICE)
    target[0, -1, -1] = 5
    logits[0, 5, -1, -1] = 4.0
    vectors = torch.zeros(4, 33, device=DEVICE) + 1
    z = logits.requires_grad_()
    loss = weighted_pixel_loss(z, target, *0 * vectors[:2], *vectors[2:], ignore_index=255, backend="triton")
    last_two = (z[..., -1:, -2:].detach(), target[..., -1:, -2:])
    expected = weighted_pixel_loss(*last_two, *0 * vectors[:2], *vectors[2:], ignore_index=255, backend="reference")
    torch.testing.assert_close(loss[..., -1, -2:], expected[..., 0, :])
    (gradient,) = torch.autograd.grad(loss, z, torch.ones_like(loss))
    assert gradient[0, 5, -1, -1] < 0
    assert torch.equal(gradient[0, :, 0, 0], gradient[0, :, 5000, 4000])


# runs in another process, because in this one the interpreter may have replaced the compiler
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mcseg.kernels import gpu, gpu_labels, gpu_pixels, gpu_upsampled

TYPES = {"z_ptr": "*bf16", "gradient_ptr": "*bf16", "y_ptr": "*i64", "target_ptr": "*i64", "preds_ptr": "*u8"}
INTEGERS = {"classes_ptr", "rows_ptr", "columns_ptr", "row_start_ptr", "row_end_ptr", "column_start_ptr", "column_end_ptr"}
NONE = dict.fromkeys(("rows_ptr", "down_ptr", "columns_ptr", "across_ptr", "numbers_ptr", "classes_ptr"))
few = {"UP": False, "ONE": True, "U": 3, "R": 1, "BP": 128, "zp": 1, "gp": 1, **NONE}
many = {name: value for name, value in few.items() if name not in ("numbers_ptr", "classes_ptr")} | {"ONE": False, "U": 4}
coarse = {"UP": True, "ONE": False, "U": 1, "R": 4, "BP": gpu._TILE, "zp": 0, "zw": 1}
fold = {"PRECISION": "ieee", "CELLS": 14, **gpu._FOLD}


def type_of(name):
    if name.endswith("_ptr"):
        return TYPES.get(name, "*i32" if name in INTEGERS else "*fp32")
    return "fp32" if name in ("weight", "power") else "i32"


def compile_kernel(kernel, power="any", **fixed):
    fixed = {"KIND": power, "BINS": 512, "v_ptr": None, **fixed}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    if power != "margin" and kernel not in (gpu_pixels.margin_forward, gpu_pixels.margin_backward):
        fixed.pop("v_ptr", None)
    signature = {name: "constexpr" if name in fixed else type_of(name) for name in kernel.arg_names}
    if kernel is gpu_labels.count:
        signature["counts_ptr"] = "*i64"
    source = ASTSource(kernel, signature, constexprs=fixed)
    binary = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]
    print(kernel.__name__, len(binary))


for sizes in (few, many):
    compile_kernel(gpu_pixels.margin_forward, **sizes)
    compile_kernel(gpu_pixels.margin_backward, **sizes)
    compile_kernel(gpu_pixels.soft_forward, **sizes)
    compile_kernel(gpu_pixels.soft_backward, **sizes)
compile_kernel(gpu_pixels.margin_forward, **coarse)
compile_kernel(gpu_pixels.soft_forward, **coarse)
compile_kernel(gpu_upsampled.soft_statistics, **coarse)
compile_kernel(gpu_upsampled.fold, "margin", **fold)
compile_kernel(gpu_upsampled.fold, "half", **fold)
compile_kernel(gpu_labels.predict, **few)
compile_kernel(gpu_labels.predict, **coarse)
compile_kernel(gpu_labels.count, BP=gpu._LABELS)
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    """The compiler refuses code that the interpreter accepts, and needs no GPU."""
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    process = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert process.returncode == 0, process.stderr[-2000:]
    sizes = [int(line.split()[1]) for line in process.stdout.splitlines()]
    assert len(sizes) == 16
    assert min(sizes) > 1000
