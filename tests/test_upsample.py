"""Losses of coarse logits against losses after upsampling: values, gradients, memory, training and validation steps."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mcseg import SegmentationModule
from mcseg.kernels import fuses_upsampling, upsample
from mcseg.losses import (
    CrossEntropyLoss,
    GeneralizedDiceLoss,
    IoUWeightedLoss,
    JaccardLoss,
    MarginCalibrationLoss,
    Upsampling,
    default_objective,
    margin_calibration_loss,
)
from mcseg.margins import margin_offsets
from mcseg.networks import SegmentationNetwork

PIXELS = [9000, 700, 250, 50]
OBJECTIVES = {
    "margins": lambda: MarginCalibrationLoss(4).calibrate(PIXELS),
    "sum": lambda: MarginCalibrationLoss(4, "miou", reduction="sum").calibrate(PIXELS),
    "iou weights": lambda: IoUWeightedLoss(4).calibrate(PIXELS),
    "default": default_objective,
    "jaccard": lambda: JaccardLoss(per_image=True),
    "generalized dice": GeneralizedDiceLoss,
}


def draw(coarse, full, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, *coarse, generator=generator, dtype=dtype)
    target = torch.randint(0, 4, (2, *full), generator=generator)
    target[0, 0] = 255
    return logits, target


def interpolate(logits, target, size, align_corners):
    height, width = target.shape[-2:]
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)[..., :height, :width]


@settings(deadline=None, max_examples=60)
@given(
    coarse=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    full=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    cut=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    align_corners=st.booleans(),
    strip=st.sampled_from([1, 300, 10**9]),
    objective=st.sampled_from(list(OBJECTIVES)),
    seed=st.integers(0, 99),
)
def test_losses_equal_those_after_upsampling(coarse, full, cut, align_corners, strip, objective, seed):
    size = [max(1, length - removed) for length, removed in zip(full, cut, strict=True)]
    logits, target = draw(coarse, size, seed)
    results = []
    for fused in (True, False):
        loss = OBJECTIVES[objective]()
        z = logits.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upsample, "_STRIP", strip)
            if fused:
                value = loss(z, target, Upsampling(*full, align_corners))
            else:
                value = loss(interpolate(z, target, full, align_corners), target)
            value.backward()
        results.append([value.detach(), z.grad, *loss.class_statistics.values(), *loss.state_dict().values()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("coarse", "full"), [(1, 7), (5, 20), (5, 17), (7, 7), (9, 4), (6, 96), (3, 1)])
def test_neighbours_equal_those_of_torch(coarse, full, align_corners):
    values = torch.randn(1, 1, coarse, 1, dtype=torch.float64)
    lower, upper, weight = upsample.neighbours(coarse, full, align_corners, torch.float64)
    actual = values[0, 0, lower, 0] * (1 - weight) + values[0, 0, upper, 0] * weight
    expected = F.interpolate(values, (full, 1), mode="bilinear", align_corners=align_corners)[0, 0, :, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_with_an_upsampling_compiles_in_one_graph(objective):
    torch.compiler.reset()
    logits, target = draw((5, 6), (17, 21))
    loss = OBJECTIVES[objective]()
    results = []
    for function in (loss, torch.compile(OBJECTIVES[objective](), fullgraph=True, backend="aot_eager")):
        z = logits.clone().requires_grad_()
        value = function(z, target, upsample=True)
        value.backward()
        results.append((value.detach(), z.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_corners_are_aligned_by_default(reduction):
    logits, target = draw((5, 6), (17, 21))
    offsets = margin_offsets(PIXELS)
    actual = margin_calibration_loss(logits, target, offsets, reduction=reduction, upsample=True)
    expected = margin_calibration_loss(interpolate(logits, target, (17, 21), True), target, offsets, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_float32_and_bfloat16_with_upstream_gradients():
    logits, target = draw((5, 6), (17, 21), dtype=torch.float32)
    offsets = margin_offsets(PIXELS, "miou")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        weights = torch.rand(2, 17, 21)
        gradients = []
        for fused in (True, False):
            z = logits.to(dtype).detach().clone().requires_grad_()
            if fused:
                loss = margin_calibration_loss(z, target, offsets, reduction="none", upsample=True)
            else:
                upsampled = interpolate(z.double(), target, (17, 21), True)
                loss = margin_calibration_loss(upsampled, target, offsets, reduction="none")
            (loss * weights).sum().backward()
            gradients.append(z.grad)
        assert gradients[0].dtype == dtype
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_no_tensor_has_the_size_of_the_upsampled_logits(monkeypatch):
    monkeypatch.setattr(upsample, "_STRIP", 4 * 64 * 8)
    largest = 0
    from torch.utils._python_dispatch import TorchDispatchMode

    class RecordLargest(TorchDispatchMode):
        """Record the size of the largest tensor that an operation returns."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    logits, target = torch.randn(1, 4, 16, 16, requires_grad=True), torch.randint(0, 4, (1, 64, 64))
    loss = default_objective()
    with RecordLargest():
        loss(logits, target, upsample=True).backward()
    assert largest <= target.numel()  # a quarter of the upsampled logits


def test_void_images_nan_and_invalid_inputs():
    logits, target = draw((3, 4), (9, 12))
    loss = default_objective()
    z = logits.clone().requires_grad_()
    value = loss(z, torch.full_like(target, 255), upsample=True)
    value.backward()
    assert float(value.detach()) == 0
    assert not z.grad.any()
    logits[0, 1, 1, 1] = torch.nan
    assert loss(logits, target, upsample=True).isnan()
    with pytest.raises(ValueError, match=r"upsampling: found .*\(9, 12\).*\(8, 12\)"):
        loss(logits, target, Upsampling(8, 12))
    with pytest.raises(ValueError, match=r"upsampling: found .*\(2, 4, 3\).*\(2, 9, 12\)"):
        loss(logits[..., 0], target, Upsampling(9, 12))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(z, target, upsample=True), z, create_graph=True)


ENDS_IN_UPSAMPLING = {"fpn": True, "deeplabv3plus": True, "unet": False}


@pytest.mark.parametrize("arch", ENDS_IN_UPSAMPLING)
def test_networks_return_the_logits_before_their_upsampling(arch):
    network = SegmentationNetwork(arch, "tu-test_resnet.r160_in1k", 4).eval()
    image = torch.rand(1, 3, 40, 50)  # padded to a multiple of 32
    with torch.no_grad():
        logits, upsampling = network.forward_coarse(image)
    if not ENDS_IN_UPSAMPLING[arch]:
        assert upsampling is None
        with torch.no_grad():
            assert torch.equal(logits, network(image))
        assert logits.shape[-2:] == (40, 50)
        return
    with torch.no_grad():
        logits, (height, width, align_corners) = network.forward_coarse(image)
        expected = network(image)
    assert logits.shape[-1] * 4 == width
    actual = F.interpolate(logits, (height, width), mode="bilinear", align_corners=align_corners)[..., :40, :50]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert set(network.state_dict()) == set(copy.deepcopy(network).state_dict())


@pytest.mark.parametrize("objective", ["default", "cross entropy"])
@pytest.mark.parametrize("arch", ["fpn", "unet"])
def test_fused_upsample_does_not_change_a_training_step(arch, objective):
    """Compare loss and gradients of all parameters, also for a network or objective that does not support the option."""
    torch.manual_seed(0)
    batch = {"image": torch.rand(2, 3, 40, 56), "mask": torch.randint(0, 4, (2, 40, 56))}
    loss_function = default_objective() if objective == "default" else CrossEntropyLoss()
    options = {"decoder_dropout": 0.0} if arch == "fpn" else {"decoder_channels": [16, 16, 8, 8, 8]}
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        module = SegmentationModule(
            arch,
            "tu-test_resnet.r160_in1k",
            num_classes=4,
            objective=loss_function,
            network_options=options,
            fused_upsample=fused,
        )
        module._log_losses = lambda *_: None
        loss = module.training_step(batch, 0)
        loss.backward()
        results.append((float(loss.detach()), [p.grad for p in module.network.parameters()]))
    (value, gradients), (fused_value, fused_gradients) = results
    assert fused_value == pytest.approx(value, rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for expected, actual in zip(gradients, fused_gradients, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * largest + 1e-9


def test_upsampling_is_fused_by_default_where_gpu_kernels_run(monkeypatch):
    has_triton = importlib.util.find_spec("triton") is not None
    assert fuses_upsampling(torch.device("cuda")) == has_triton
    assert not fuses_upsampling(torch.device("cpu"))
    for objective, fuses in ((default_objective(), has_triton), (CrossEntropyLoss(), False)):
        module = SegmentationModule("fpn", "tu-test_resnet.r160_in1k", num_classes=4, objective=objective)
        assert module._fuses_upsampling is False
        monkeypatch.setattr(type(module), "device", torch.device("cuda"))
        assert module._fuses_upsampling == fuses
        module.hparams["fused_upsample"] = False
        assert module._fuses_upsampling is False
        monkeypatch.undo()


@pytest.mark.parametrize("masks", [(40, 50), (20, 25)])  # masks of another size than the images are not fused
def test_fused_upsample_does_not_change_a_validation_step(masks):
    torch.manual_seed(0)
    batch = {"image": torch.rand(2, 3, 40, 50), "mask": torch.randint(0, 4, (2, *masks))}
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        objective = default_objective()
        module = SegmentationModule(
            "fpn", "tu-test_resnet.r160_in1k", num_classes=4, objective=objective, fused_upsample=fused
        ).eval()
        module._trainer = SimpleNamespace(world_size=1, val_dataloaders=None)
        calls = []
        module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            output = module.validation_step(batch, 0)
        assert bool(calls) == (not fused or masks != (40, 50))  # forward, which computes the full logits, is called
        results.append((float(module._evaluated[0]), output["preds"]))
    (value, preds), (fused_value, fused_preds) = results
    assert fused_value == pytest.approx(value, rel=1e-5)
    assert preds.shape == fused_preds.shape == (2, *masks)
    assert (preds == fused_preds).double().mean() > 0.999
