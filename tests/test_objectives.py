"""All objectives: a common contract, values from loops over the papers' formulas, special cases; sums and warm-up."""

import copy
import inspect
import io
import math
import pickle
from decimal import Decimal, getcontext
from functools import partial

import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import golden_cases
from torch import nn

from mcseg.checkpoints.hyperparameters import _constructor_arguments
from mcseg.losses import (
    BalancedSoftmaxLoss,
    CrossEntropyLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    IoUWeightedLoss,
    JaccardLoss,
    LDAMLoss,
    LogitAdjustmentLoss,
    LovaszSoftmaxLoss,
    MarginCalibrationLoss,
    TverskyLoss,
)
from mcseg.losses.combine import SumLoss
from mcseg.losses.probe import build_objective, check_objective

C = 4
COUNTS = [5000, 30, 900, 7]
WEIGHTINGS = ["inverse", "median_frequency", "effective_number", "enet"]
ALPHA = [0.5, 2.0, 0.1, 1.0]

# name -> function that builds the uncalibrated objective and accepts `ignore_index`
OBJECTIVES = {
    "cross_entropy": CrossEntropyLoss,
    "cross_entropy_smooth": partial(CrossEntropyLoss, label_smoothing=0.1),
    **{f"cross_entropy_{w}": partial(CrossEntropyLoss, C, w, beta=0.999) for w in WEIGHTINGS},
    "cross_entropy_enet_smooth": partial(CrossEntropyLoss, C, "enet", label_smoothing=0.1),
    "cross_entropy_given_weights": partial(CrossEntropyLoss, weight=ALPHA, label_smoothing=0.1),
    "focal": FocalLoss,
    "focal_given_weights": partial(FocalLoss, weight=ALPHA),
    "focal_root": partial(FocalLoss, gamma=0.5, alpha=ALPHA),
    "logit_adjustment": partial(LogitAdjustmentLoss, C, tau=1.5),
    "balanced_softmax": partial(BalancedSoftmaxLoss, C),
    "margin_calibration": partial(MarginCalibrationLoss, C, tau=0.5),
    "margin_calibration_miou": partial(MarginCalibrationLoss, C, "miou", backend="reference"),
    "iou_weighted": partial(IoUWeightedLoss, C, decay=0.0),
    "ldam": partial(LDAMLoss, C),
    "ldam_scaled": partial(LDAMLoss, C, max_margin=0.7, scale=30.0),
    **{
        f"{name}_{'image' if per_image else 'batch'}_{classes}": partial(cls, per_image=per_image, classes=classes, **more)
        for name, cls, more in [
            ("dice", DiceLoss, {}),
            ("dice_power", DiceLoss, {"power": 0.5}),
            ("dice_rough", DiceLoss, {"smooth": 0.0}),
            ("jaccard", JaccardLoss, {}),
            ("jaccard_power", JaccardLoss, {"power": 0.25, "backend": "reference"}),
            ("jaccard_rough", JaccardLoss, {"smooth": 0.0}),
            ("tversky", TverskyLoss, {}),
            ("tversky_power", TverskyLoss, {"power": 0.5}),
            ("tversky_focal", TverskyLoss, {"gamma": 4 / 3, "smooth": 0.0}),
            ("generalized_dice", GeneralizedDiceLoss, {}),
            ("lovasz", LovaszSoftmaxLoss, {}),
        ]
        for per_image in (False, True)
        for classes in ("present", "all")
    },
}
OFFSETS = ["foreground_offsets", "background_offsets"]
STORED = {"margin_calibration": OFFSETS, "margin_calibration_miou": OFFSETS, "iou_weighted": OFFSETS}
COUNTED = {name: make for name, make in OBJECTIVES.items() if hasattr(make(), "calibrate")}


def ready(name, **settings):
    loss = OBJECTIVES[name](**settings)
    return loss.calibrate(COUNTS) if name in COUNTED else loss


def case(scale=2.0, n=2, height=4, width=5, dtype=torch.float64):
    """Create two images with void; the second has no class 3, and none has class 1."""
    torch.manual_seed(1)
    target = torch.tensor([0, 2, 3])[torch.randint(3, (n, height, width))]
    target[-1][target[-1] == 3] = 0
    target[:, 0, :3] = 255
    return (scale * torch.randn(n, C, height, width, dtype=torch.float64)).to(dtype).requires_grad_(), target


def value_and_gradient(loss, logits, target):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, target)
    value.backward()
    return value.detach(), logits.grad


every = pytest.mark.parametrize("name", OBJECTIVES)
counted = pytest.mark.parametrize("name", COUNTED)


# The contract


@every
def test_void_changes_nothing(name):
    logits, labels = case()
    assert not (labels == 1).any()
    void = (labels == 255)[:, None].expand_as(logits)
    others = (
        *(logits.masked_fill(void, junk) for junk in (0, -50, torch.nan, torch.inf, -torch.inf)),
        torch.where(void, logits.flip(1) * 9, logits),
    )
    for ignore_index in (255, 1, -1):
        target = labels.masked_fill(labels == 255, ignore_index)
        loss = ready(name, ignore_index=ignore_index)
        value, gradient = value_and_gradient(loss, logits, target)
        assert gradient[void].eq(0).all()
        assert gradient[~void].ne(0).any()
        for other in others:
            again, its_gradient = value_and_gradient(loss, other, target)
            assert torch.equal(again, value)
            assert torch.equal(its_gradient, gradient)


@every
def test_void_borders_can_be_cropped(name):
    logits, target = case()
    loss = ready(name)
    padded = nn.functional.pad(logits, (0, 3, 2, 0), value=3.0)
    assert loss(padded, nn.functional.pad(target, (0, 3, 2, 0), value=255)).item() == pytest.approx(
        loss(logits, target).item(), rel=1e-12
    )


@every
def test_images_without_labels_do_not_change_the_mean(name):
    logits, target = case()
    loss = ready(name)
    more = torch.cat([logits, logits[:1]]), torch.cat([target, torch.full_like(target[:1], 255)])
    assert loss(*more).item() == pytest.approx(loss(logits, target).item(), rel=1e-12)


@every
def test_nothing_labelled(name):
    logits, target = case()
    loss = ready(name)
    for dtype in (torch.float16, torch.float32, torch.float64):
        for largest in (1.0, 1e4):
            scores = (logits / logits.abs().max() * largest).to(dtype)
            value, gradient = value_and_gradient(loss, scores, torch.full_like(target, 255))
            assert value.item() == 0
            assert value.shape == ()
            assert gradient.eq(0).all()
    assert loss(logits[:0], target[:0]).item() == 0


@every
def test_extreme_logits_give_finite_values(name):
    _, target = case()
    loss = ready(name)
    signs = torch.randint(0, 2, (2, C, 4, 5)) * 2.0 - 1
    right = nn.functional.one_hot(target.masked_fill(target == 255, 0), C).movedim(-1, 1) * 2.0 - 1
    for logits in (signs * 1e4, right * 1e4, -right * 1e4, right * 20, torch.zeros_like(right), signs * 100 + 1e4):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            value, gradient = value_and_gradient(loss, logits.to(dtype), target)
            assert value.isfinite()
            assert gradient.isfinite().all()
            assert value.item() >= -1e-6


@every
def test_shape_and_dtype(name):
    logits, target = case()
    exact = ready(name)(logits, target).item()
    for dtype, tolerance in [(torch.float64, 1e-15), (torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]:
        for labels in (target, target.to(torch.uint8), target.int()):
            value = ready(name)(logits.to(dtype), labels)
            assert value.shape == ()
            assert value.dtype == torch.promote_types(dtype, torch.float32)
            assert value.item() == pytest.approx(exact, rel=tolerance)


@every
def test_order_and_layout_of_pixels_do_not_matter(name):
    logits, target = case()
    loss = ready(name)
    value, gradient = value_and_gradient(loss, logits, target)
    order = torch.randperm(20)
    mixed, its_gradient = value_and_gradient(loss, logits.flatten(2)[..., order], target.flatten(1)[..., order])
    assert mixed.item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(its_gradient, gradient.flatten(2)[..., order], rtol=1e-9, atol=1e-14)
    laid_out = loss(logits.to(memory_format=torch.channels_last), target)
    assert laid_out.item() == pytest.approx(value.item(), rel=1e-12)
    if "image" not in name:  # the whole batch is one set of pixels
        one = logits.movedim(1, 0).flatten(1)[None], target.flatten()[None]
        assert loss(*one).item() == pytest.approx(value.item(), rel=1e-12)
        points = logits.movedim(1, -1).flatten(0, -2), target.flatten()
        assert loss(*points).item() == pytest.approx(value.item(), rel=1e-12)
    else:
        images = [loss(logits[i : i + 1], target[i : i + 1]).item() for i in range(2)]
        assert value.item() == pytest.approx(sum(images) / 2, rel=1e-12)


@every
def test_gradient_is_that_of_the_value(name):
    logits, target = case(scale=1.0, height=2, width=4)
    assert torch.autograd.gradcheck(
        partial(ready(name), target=target), logits, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True
    )


@every
def test_shapes_are_static_and_the_host_does_not_wait(name):
    # the meta device has no values: boolean indexing, .item() and branches on data raise
    logits, target = (t.detach().to("meta") for t in case())
    value, gradient = value_and_gradient(ready(name).to("meta"), logits, target)
    assert value.is_meta
    assert gradient.shape == logits.shape


@pytest.mark.slow
@every
def test_compiles_in_one_graph(name):
    torch.compiler.reset()
    logits, target = case()
    loss = ready(name)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for one, other in zip(
        value_and_gradient(compiled, logits, target), value_and_gradient(loss, logits, target), strict=True
    ):  # the compiled loss may use the reference backend where the loss itself uses the fused one
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@every
def test_rebuilt_from_attributes(name):
    loss = ready(name)
    arguments = _constructor_arguments(loss, "objective")
    other = type(loss)(**arguments)
    assert f"{type(loss).__module__}.{type(loss).__name__}" == f"mcseg.losses.{type(loss).__name__}"
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(*case()), loss(*case()))
    assert all(f"{key}={value!r}" in repr(loss) for key, value in arguments.items())


@every
def test_copies_are_independent(name):
    loss = ready(name)
    expected = loss(*case())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(*case()), expected)
        if name in COUNTED:
            other.calibrate([1, 2, 3, 4])
            assert torch.equal(loss(*case()), expected)


@every
def test_casting_changes_nothing(name):
    expected = ready(name)(*case())
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("cpu", torch.half)):
        loss = ready(name)
        model = cast(nn.ModuleDict({"layer": nn.Linear(2, 2), "objective": loss}))
        assert model["layer"].weight.dtype != torch.float32
        assert torch.equal(loss(*case()), expected)


@every
def test_built_on_the_meta_device(name):
    with torch.device("meta"):
        loss = OBJECTIVES[name]()
    loss.to_empty(device="cpu")
    if name in COUNTED:
        assert not loss.is_calibrated
        assert all(getattr(loss, stored).isnan().all() for stored in STORED.get(name, ["class_pixels"]))
        loss.calibrate(COUNTS)
    assert torch.equal(loss(*case()), ready(name)(*case()))


@every
def test_invalid_inputs_are_refused(name):
    loss = ready(name)
    for logits, target, error, message in [
        (torch.zeros(1, C, 2, 2).long(), torch.zeros(1, 2, 2).long(), TypeError, "logits: found dtype torch.int64"),
        (torch.zeros(1, C, 2, 2), torch.zeros(1, 2, 2), TypeError, "target: found dtype torch.float32"),
        (torch.zeros(1, C, 2, 2), torch.zeros(1, 2, 2).bool(), TypeError, "target: found dtype torch.bool"),
        (torch.zeros(C), torch.zeros(()).long(), ValueError, r"logits: found shape \(4,\)"),
        (torch.zeros(1, C, 2, 2), torch.zeros(1, C, 2, 2).long(), ValueError, "without a class dimension"),
        (torch.zeros(1, C, 2, 2), torch.full((1, 2, 2), C), ValueError, "target: found (label|class) 4, expected 0"),
        (torch.zeros(1, C, 2, 2), torch.full((1, 2, 2), -1), ValueError, "target: found (label|class) -1, expected 0"),
    ]:
        with pytest.raises(error, match=message) as caught:
            loss(logits, target)
        assert "\n" not in str(caught.value)


# Calibration


@counted
def test_an_uncalibrated_objective_raises(name):
    loss = OBJECTIVES[name]()
    assert not loss.is_calibrated
    assert all(getattr(loss, stored).isnan().all() for stored in STORED.get(name, ["class_pixels"]))
    assert "calibrated=False" in repr(loss)
    with pytest.raises(RuntimeError, match=r"Loss is not calibrated: call loss.calibrate\(class_pixels\)") as caught:
        loss(*case())
    assert "\n" not in str(caught.value)
    for counts, message in [([1, 2, 3], "found 3 counts, expected 4"), ([1, 2, -3, 4], "found -3 for class 2")]:
        with pytest.raises(ValueError, match=message):
            loss.calibrate(counts)
    assert not loss.is_calibrated
    assert loss.calibrate(torch.tensor(COUNTS)) is loss
    assert loss.is_calibrated
    assert "calibrated=True" in repr(loss)
    with pytest.raises(ValueError, match="logits: found 5 classes"):
        loss(torch.zeros(1, 5, 2, 2), torch.zeros(1, 2, 2).long())


@counted
def test_state_dict_round_trip(name):
    loss = ready(name)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    stored = STORED.get(name, ["class_pixels"])
    assert list(state)[: len(stored)] == stored
    if "class_pixels" in stored:
        assert state["class_pixels"].tolist() == COUNTS
    for assign in (False, True):
        model = nn.ModuleDict({"objective": OBJECTIVES[name]()})
        model.load_state_dict({f"objective.{key}": value.clone() for key, value in state.items()}, assign=assign)
        assert model["objective"].is_calibrated
        assert torch.equal(model["objective"](*case()), loss(*case()))
    loss.load_state_dict(OBJECTIVES[name]().state_dict())
    assert not loss.is_calibrated
    assert not loss.class_constants


@counted
def test_a_class_without_pixels_is_named_and_gives_finite_values(name):
    with pytest.warns(UserWarning, match="no pixels of class 1; ") as caught:
        loss = OBJECTIVES[name]().calibrate([500, 0, 30, 7])
    assert caught[0].filename == __file__
    expected = math.log(1 / 537) * loss.tau if isinstance(loss, LogitAdjustmentLoss) else 0
    for constants in loss.class_constants.values():
        assert constants.isfinite().all()
        assert constants[1].item() == pytest.approx(expected)
    # validation labels with this class, with and without other classes
    logits, target = case()
    for labels in (target.masked_fill(target == 2, 1), target.masked_fill(target != 255, 1)):
        value, gradient = value_and_gradient(loss, logits, labels)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_objectives_without_counts_have_no_calibrate():
    for loss in (CrossEntropyLoss(), CrossEntropyLoss(ignore_index=255), CrossEntropyLoss(C), FocalLoss(), DiceLoss()):
        assert not hasattr(loss, "calibrate")
        assert getattr(loss, "is_calibrated", True)
        assert not loss.state_dict()
        assert "calibrated" not in repr(loss)
    with pytest.raises(AttributeError, match="calibrate"):
        CrossEntropyLoss().calibrate([1, 2])
    assert torch.equal(CrossEntropyLoss(C)(*case()), CrossEntropyLoss()(*case()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(CrossEntropyLoss, C, "median"), "weighting: found 'median', expected one of 'none', 'inverse'"),
        (partial(CrossEntropyLoss, weighting="enet"), "num_classes: found None"),
        (partial(CrossEntropyLoss, 1), "num_classes: found 1, expected at least 2"),
        (partial(CrossEntropyLoss, beta=1.0), "beta: found 1.0, expected a number >= 0 and < 1"),
        (partial(CrossEntropyLoss, enet_c=1.0), "enet_c: found 1.0, expected a finite number > 1"),
        (partial(CrossEntropyLoss, label_smoothing=math.nan), "label_smoothing: found nan"),
        (partial(FocalLoss, gamma=-1.0), "gamma: found -1.0, expected a finite number >= 0"),
        (partial(FocalLoss, alpha=[1.0, math.inf]), "alpha: found inf"),
        (partial(CrossEntropyLoss, weight=[1.0, -2.0]), "weight: found -2.0, expected a finite number >= 0"),
        (partial(CrossEntropyLoss, weight=torch.tensor([1.0, math.nan])), "weight: found nan"),
        (partial(CrossEntropyLoss, weight=[0, 0]), "weight: found only zeros"),
        (partial(CrossEntropyLoss, weight=[[1.0, 2.0]]), r"weight: found shape \(1, 2\)"),
        (partial(CrossEntropyLoss, 3, weight=[1.0, 2.0]), "weight: found 2 weights, expected 3, one per class"),
        (partial(CrossEntropyLoss, 2, "enet", weight=[1.0, 2.0]), "found weight and weighting 'enet'"),
        (partial(CrossEntropyLoss, torch.ones(3)), "num_classes: found .* give class weights as weight="),
        (partial(FocalLoss, weight=[1.0, math.inf]), "weight: found inf"),
        (partial(FocalLoss, alpha=[1.0, 2.0], weight=[1.0, 2.0]), "found alpha and weight"),
        (partial(LogitAdjustmentLoss, C, tau=-0.1), "tau: found -0.1"),
        (partial(LDAMLoss, C, max_margin=0.0), "max_margin: found 0.0, expected a finite number > 0"),
        (partial(LDAMLoss, C, scale=0.0), "scale: found 0.0"),
        (partial(DiceLoss, classes="some"), "classes: found 'some', expected one of 'present', 'all'"),
        (partial(DiceLoss, smooth=-1.0), "smooth: found -1.0"),
        (partial(JaccardLoss, smooth=math.inf), "smooth: found inf"),
        (partial(TverskyLoss, alpha=-1.0), "alpha: found -1.0"),
        (partial(TverskyLoss, beta=-1.0), "beta: found -1.0"),
        (partial(TverskyLoss, gamma=0.0), "gamma: found 0.0, expected a finite number > 0"),
        (partial(TverskyLoss, smooth=-1.0), "smooth: found -1.0"),
        (partial(LovaszSoftmaxLoss, classes="some"), "classes: found 'some'"),
    ],
)
def test_settings_are_checked_when_built(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("make", "name"), [(FocalLoss, "alpha"), (FocalLoss, "weight"), (CrossEntropyLoss, "weight")])
def test_weights_for_another_number_of_classes_are_refused(make, name):
    with pytest.raises(ValueError, match=f"{name}: found 2 weights, expected 4, one per class"):
        make(**{name: [1.0, 2.0]})(*case())


# Values: loops in double precision, from the formulas


def softmax(z):
    top = max(z)
    powers = [math.exp(v - top) for v in z]
    return [v / math.fsum(powers) for v in powers]


def pixels_of(logits, target):
    """List the labelled pixels of each image as (logits, label)."""
    return [
        [
            ([float(v) for v in logits[n, :, y, x]], int(target[n, y, x]))
            for y in range(target.shape[1])
            for x in range(target.shape[2])
            if target[n, y, x] != 255
        ]
        for n in range(len(target))
    ]


def check(loss, loop, rel=1e-10):
    logits, target = case()
    expected = loop(pixels_of(logits.detach(), target))
    assert loss(logits, target).item() == pytest.approx(expected, rel=rel, abs=0)
    assert expected > 1e-3  # a number worth comparing


def mean_over_pixels(pixel):
    def loop(images):
        values = [pixel(z, y) for image in images for z, y in image]
        return math.fsum(values) / len(values)

    return loop


def oracle_weights(weighting, counts, beta=0.999, enet_c=1.02):
    getcontext().prec = 60
    n = [Decimal(c) for c in counts]
    total = sum(n)
    if weighting == "inverse":
        w = [1 / c for c in n]
        return [float(v * len(w) / sum(w)) for v in w]
    if weighting == "median_frequency":
        f = [c / total for c in n]
        low, high = sorted(f)[1:3]  # of four classes
        return [float((low + high) / 2 / v) for v in f]
    if weighting == "effective_number":
        b = Decimal.from_float(beta)
        w = [(1 - b) / (1 - b**c) for c in n]
        return [float(v * len(w) / sum(w)) for v in w]
    return [float(1 / (Decimal.from_float(enet_c) + c / total).ln()) for c in n]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weighted_cross_entropy_against_a_loop(weighting, smoothing):
    loss = CrossEntropyLoss(C, weighting, beta=0.999, label_smoothing=smoothing).calibrate(COUNTS)
    w = oracle_weights(weighting, COUNTS)
    assert loss.class_terms.tolist() == pytest.approx(w, rel=1e-12)

    def loop(images):
        total = norm = 0.0
        for z, y in (pixel for image in images for pixel in image):
            p = softmax(z)
            for k in range(C):
                total -= w[k] * ((1 - smoothing) * (k == y) + smoothing / C) * math.log(p[k])
            norm += w[y]
        return total / norm

    check(loss, loop)


def test_weights_by_hand():
    def weights(weighting, counts, **settings):
        return CrossEntropyLoss(len(counts), weighting, **settings).calibrate(counts).class_terms.tolist()

    assert weights("inverse", [1, 2, 4]) == pytest.approx([12 / 7, 6 / 7, 3 / 7], rel=1e-14)
    assert weights("median_frequency", [1, 2, 4]) == pytest.approx([2, 1, 0.5], rel=1e-14)
    assert weights("median_frequency", [1, 2, 4, 8]) == pytest.approx([3, 1.5, 0.75, 0.375], rel=1e-14)
    # 1 - 0.5^n = 1/2, 3/4: weights before scaling 1 and 2/3
    assert weights("effective_number", [1, 2], beta=0.5) == pytest.approx([6 / 5, 4 / 5], rel=1e-14)
    assert weights("effective_number", [1, 9], beta=0.0) == [1, 1]
    assert weights("enet", [1, 3], enet_c=1.5) == pytest.approx([1 / math.log(1.75), 1 / math.log(2.25)], rel=1e-14)
    with pytest.warns(UserWarning, match="no pixels of class 1; its weight is 0"):
        assert weights("inverse", [1, 0, 2, 4]) == pytest.approx([12 / 7, 0, 6 / 7, 3 / 7], rel=1e-14)
    with pytest.warns(UserWarning, match="no pixels of class 3"):
        assert weights("median_frequency", [1, 2, 4, 0]) == pytest.approx([2, 1, 0.5, 0], rel=1e-14)
    # a thousand million pixels of the default beta
    beta = Decimal.from_float(0.999999)
    rare, common = (1 / (1 - beta**n) for n in (1000, 10**9))
    expected = [float(2 * w / (rare + common)) for w in (rare, common)]
    assert weights("effective_number", [1000, 10**9]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_unweighted_cross_entropy_against_a_loop(smoothing):
    def pixel(z, y):
        p = softmax(z)
        return -math.fsum(((1 - smoothing) * (k == y) + smoothing / C) * math.log(p[k]) for k in range(C))

    check(CrossEntropyLoss(label_smoothing=smoothing), mean_over_pixels(pixel))


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_against_a_loop(gamma, alpha):
    def pixel(z, y):
        p = softmax(z)[y]
        return -(1.0 if alpha is None else alpha[y]) * (1 - p) ** gamma * math.log(p)

    check(FocalLoss(gamma, alpha), mean_over_pixels(pixel))


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.0])
def test_logit_adjustment_against_a_loop(tau):
    def pixel(z, y):
        return -math.log(softmax([v + tau * math.log(n / sum(COUNTS)) for v, n in zip(z, COUNTS, strict=True)])[y])

    check(LogitAdjustmentLoss(C, tau).calibrate(COUNTS), mean_over_pixels(pixel))


def test_balanced_softmax_against_a_loop():
    def pixel(z, y):
        return -math.log(COUNTS[y] * math.exp(z[y]) / math.fsum(n * math.exp(v) for n, v in zip(COUNTS, z, strict=True)))

    check(BalancedSoftmaxLoss(C).calibrate(COUNTS), mean_over_pixels(pixel))


@pytest.mark.parametrize(("max_margin", "scale"), [(0.5, 1.0), (0.3, 30.0)])
def test_ldam_against_a_loop(max_margin, scale):
    margins = [1 / n**0.25 for n in COUNTS]
    margins = [m * max_margin / max(margins) for m in margins]

    def pixel(z, y):
        moved = [scale * (v - margins[y] * (k == y)) for k, v in enumerate(z)]
        return -math.log(softmax(moved)[y])

    check(LDAMLoss(C, max_margin, scale).calibrate(COUNTS), mean_over_pixels(pixel))


def region_loop(region, per_image, classes):
    """Average ``region(tp, fp, fn)`` of soft counts over classes and images."""

    def loop(images):
        sets = [image for image in images if image] if per_image else [[pixel for image in images for pixel in image]]
        means = []
        for pixels in sets:
            losses = []
            for c in range(C):
                if classes == "present" and all(y != c for _, y in pixels):
                    continue
                hit = math.fsum(softmax(z)[c] for z, y in pixels if y == c)
                false_alarm = math.fsum(softmax(z)[c] for z, y in pixels if y != c)
                miss = math.fsum(1 - softmax(z)[c] for z, y in pixels if y == c)
                losses.append(region(hit, false_alarm, miss))
            means.append(math.fsum(losses) / len(losses))
        return math.fsum(means) / len(means)

    return loop


per_set = pytest.mark.parametrize("per_image", [False, True])
over_classes = pytest.mark.parametrize("classes", ["present", "all"])
smoothed = pytest.mark.parametrize("smooth", [0.0, 1.0, 3.0])


@per_set
@over_classes
@smoothed
def test_dice_against_a_loop(per_image, classes, smooth):
    loop = region_loop(lambda t, f, m: 1 - (2 * t + smooth) / (2 * t + f + m + smooth), per_image, classes)
    check(DiceLoss(per_image, classes, smooth), loop)


@per_set
@over_classes
@smoothed
def test_jaccard_against_a_loop(per_image, classes, smooth):
    loop = region_loop(lambda t, f, m: 1 - (t + smooth) / (t + f + m + smooth), per_image, classes)
    check(JaccardLoss(per_image, classes, smooth), loop)


@per_set
@over_classes
@smoothed
@pytest.mark.parametrize("gamma", [1.0, 4 / 3])
def test_tversky_against_a_loop(per_image, classes, smooth, gamma):
    def region(t, f, m):
        return (1 - (t + smooth) / (t + 0.2 * f + 0.9 * m + smooth)) ** (1 / gamma)

    check(TverskyLoss(0.2, 0.9, gamma, per_image, classes, smooth), region_loop(region, per_image, classes))


@per_set
@over_classes
def test_generalized_dice_against_a_loop(per_image, classes):
    def loop(images):
        sets = images if per_image else [[pixel for image in images for pixel in image]]
        values = []
        for pixels in sets:
            sizes = [sum(y == c for _, y in pixels) for c in range(C)]
            rarest = min(size for size in sizes if size)
            weights = [1 / size**2 if size else (1 / rarest**2 if classes == "all" else 0) for size in sizes]
            overlap = math.fsum(weights[y] * softmax(z)[y] for z, y in pixels)
            total = math.fsum(weights[c] * (softmax(z)[c] + (y == c)) for z, y in pixels for c in range(C))
            values.append(1 - 2 * overlap / total)
        return math.fsum(values) / len(values)

    check(GeneralizedDiceLoss(per_image, classes), loop)


def jaccard_of_errors(wrong, truth):
    """Compute the Jaccard loss of a class if exactly these pixels are wrong: 1 - |truth and guess| / |truth or guess|."""
    guess = truth ^ wrong
    return 1 - len(truth & guess) / len(truth | guess) if truth | guess else 0.0


@per_set
@over_classes
def test_lovasz_against_a_loop(per_image, classes):
    # the definition (eq. 8 and 9 of the paper) with sets of pixels, without cumulative sums
    def loop(images):
        sets = images if per_image else [[pixel for image in images for pixel in image]]
        means = []
        for pixels in sets:
            losses = []
            for c in range(C):
                truth = {i for i, (_, y) in enumerate(pixels) if y == c}
                if classes == "present" and not truth:
                    continue
                errors = {i: abs((y == c) - softmax(z)[c]) for i, (z, y) in enumerate(pixels)}
                order = sorted(errors, key=errors.get, reverse=True)
                steps = [
                    jaccard_of_errors(set(order[: i + 1]), truth) - jaccard_of_errors(set(order[:i]), truth)
                    for i in range(len(order))
                ]
                losses.append(math.fsum(errors[i] * step for i, step in zip(order, steps, strict=True)))
            means.append(math.fsum(losses) / len(losses))
        return math.fsum(means) / len(means)

    check(LovaszSoftmaxLoss(per_image, classes), loop)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("kind", ["per_image", "batch"])
def test_lovasz_against_the_authors_implementation(number, kind):
    numbers = golden_cases()[number]
    logits, target = torch.from_numpy(numbers["logits"]).double(), torch.from_numpy(numbers["target"])
    value, gradient = value_and_gradient(LovaszSoftmaxLoss(per_image=kind == "per_image"), logits, target)
    assert value.item() == pytest.approx(numbers[f"lovasz_softmax_{kind}"].item(), rel=1e-10)
    expected = torch.from_numpy(numbers[f"lovasz_grad_{kind}"])
    # elements that cancel to 1e-10 of the largest element have no exact digits left
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13 * expected.abs().max().item())


# Special cases


def same(one, other, rel=1e-12):
    for actual, expected in zip(value_and_gradient(one, *case()), value_and_gradient(other, *case()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=rel, atol=rel * expected.abs().max().item())


def test_focal_of_gamma_0_is_cross_entropy():
    same(FocalLoss(gamma=0.0), CrossEntropyLoss())


def test_logit_adjustment_of_tau_0_is_cross_entropy():
    same(LogitAdjustmentLoss(C, tau=0.0).calibrate(COUNTS), CrossEntropyLoss())


def test_balanced_softmax_is_logit_adjustment_of_tau_1():
    same(BalancedSoftmaxLoss(C).calibrate(COUNTS), LogitAdjustmentLoss(C, tau=1.0).calibrate(COUNTS))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_equal_counts_give_the_unweighted_loss(weighting):
    same(CrossEntropyLoss(C, weighting, label_smoothing=0.1).calibrate([50] * C), CrossEntropyLoss(label_smoothing=0.1))


def test_weighted_cross_entropy_equals_that_of_torch():
    loss = ready("cross_entropy_inverse", label_smoothing=0.1)
    same(loss, nn.CrossEntropyLoss(loss.class_terms, ignore_index=255, label_smoothing=0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [ALPHA, tuple(ALPHA), torch.tensor(ALPHA), [0, 2, 1, 1]])
def test_given_class_weights_are_those_of_torch(weight, smoothing):
    expected = nn.CrossEntropyLoss(torch.as_tensor(weight, dtype=torch.float64), ignore_index=255, label_smoothing=smoothing)
    loss = CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    same(loss, expected)
    assert loss.class_constants["weight"].tolist() == pytest.approx(list(map(float, weight)))
    if not smoothing:
        same(FocalLoss(gamma=0.0, weight=weight), expected)


def test_weighted_focal_against_a_loop():
    def loop(images):
        total = norm = 0.0
        for z, y in (pixel for image in images for pixel in image):
            p = softmax(z)[y]
            total -= ALPHA[y] * (1 - p) ** 2 * math.log(p)
            norm += ALPHA[y]
        return total / norm

    check(FocalLoss(2.0, weight=ALPHA), loop)


@per_set
@over_classes
@pytest.mark.parametrize("smooth", [0.0, 2.0])
def test_dice_and_jaccard_are_special_cases_of_tversky(per_image, classes, smooth):
    same(TverskyLoss(0.5, 0.5, 1.0, per_image, classes, smooth / 2), DiceLoss(per_image, classes, smooth))
    same(TverskyLoss(1.0, 1.0, 1.0, per_image, classes, smooth), JaccardLoss(per_image, classes, smooth))


@per_set
@over_classes
@pytest.mark.parametrize("cls", [LovaszSoftmaxLoss, GeneralizedDiceLoss, partial(DiceLoss, smooth=0.0), JaccardLoss])
def test_right_predictions_have_loss_0_and_wrong_ones_loss_1(cls, per_image, classes):
    _, target = case()
    if classes == "all" and isinstance(cls, partial):
        target[:, 0, 3] = 1  # with classes='all' and without smoothing, an absent class has loss 1
        target[:, 0, 4] = 3
    right = nn.functional.one_hot(target.masked_fill(target == 255, 0), C).movedim(-1, 1) * 100.0
    wrong = nn.functional.one_hot((target + 1) % C, C).movedim(-1, 1) * 100.0
    loss = cls(per_image=per_image, classes=classes)
    assert loss(right, target).item() == pytest.approx(0, abs=1e-6)
    if cls is LovaszSoftmaxLoss:
        expected = pytest.approx(1, abs=1e-6)
        if classes == "all":
            # a class that is neither labelled nor predicted has no error; in all others every pixel is wrong
            sets = [t[t != 255] for t in target] if per_image else [target[target != 255]]
            shares = [len({int(v) for y in t.unique() for v in (y, (y + 1) % C)}) / C for t in sets]
            expected = pytest.approx(sum(shares) / len(shares), abs=1e-6)
        assert loss(wrong, target).item() == expected
    elif cls is not JaccardLoss:
        assert loss(wrong, target).item() == pytest.approx(1, abs=1e-6)


def test_lovasz_of_a_hard_prediction_is_the_jaccard_loss():
    _, target = case()
    guess = torch.randint(C, target.shape)
    loss = LovaszSoftmaxLoss()(nn.functional.one_hot(guess, C).movedim(-1, 1) * 100.0, target)
    guess[target == 255] = 255
    jaccards = [((guess == c) & (target == c)).sum() / ((guess == c) | (target == c)).sum() for c in (0, 2, 3)]
    assert loss.item() == pytest.approx(1 - sum(jaccards).item() / 3, abs=1e-6)


def test_lovasz_with_ties_is_the_limit_without_ties():
    _, target = case()
    logits = torch.randint(3, (2, C, 4, 5)).double()
    tied = LovaszSoftmaxLoss()(logits, target).item()
    assert LovaszSoftmaxLoss()(logits + 1e-9 * torch.randn_like(logits), target).item() == pytest.approx(tied, abs=1e-8)


def test_float32_is_accurate_for_many_pixels():
    """The relative error in float32 does not grow with the number of pixels, here 260,000."""
    torch.manual_seed(2)
    logits, target = 3 * torch.randn(4, C, 256, 256), (torch.rand(4, 256, 256) ** 8 * C).long()
    for loss in (LovaszSoftmaxLoss(), DiceLoss(), JaccardLoss(), GeneralizedDiceLoss(), TverskyLoss(), FocalLoss()):
        value, gradient = value_and_gradient(loss, logits, target)
        exact, exact_gradient = value_and_gradient(loss, logits.double(), target)
        assert value.item() == pytest.approx(exact.item(), rel=2e-6)
        error = (gradient - exact_gradient).norm() / exact_gradient.norm()
        assert error < 1e-5


PIXELS = [900, 80, 20]
TWO = [
    {"class_path": "mcseg.losses.MarginCalibrationLoss", "init_args": {"scheme": "miou", "max_margin": 2.0}, "weight": 0.25},
    {"class_path": "mcseg.losses.CrossEntropyLoss"},
]


def logits_and_target():
    torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 4, 5))
    target[0, 0] = 255
    return torch.randn(2, 3, 4, 5, dtype=torch.float64), target


def test_the_sum_is_weighted_and_has_its_terms():
    logits, target = logits_and_target()
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
    logits, target = logits_and_target()
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
    loss(*logits_and_target())
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


# Losses of other libraries, and the check before training
class Foreign(nn.Module):
    """A user's loss that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, logits, target):
        return self.function(logits, target)


class TakesIndex(nn.Module):
    """A user's loss whose ignore_index cannot be set."""

    ignore_index = -1

    def forward(self, logits, target):
        return nn.functional.cross_entropy(logits, target, ignore_index=-1)


void_cross_entropy = partial(nn.functional.cross_entropy, ignore_index=255)
SMP = smp.losses


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (nn.CrossEntropyLoss(), r"CrossEntropyLoss does not leave out void.*255.*out of bounds.*ignore_index -100; set ign"),
        (nn.CrossEntropyLoss(ignore_index=0), "ignore_index 0; set ignore_index to 255"),
        (nn.NLLLoss(), "NLLLoss does not leave out void"),
        (SMP.DiceLoss("multiclass"), "DiceLoss does not leave out void.*ignore_index None; set ignore_index to 255"),
        (SMP.JaccardLoss("multiclass"), "JaccardLoss does not leave out void"),
        (SMP.TverskyLoss("multiclass"), "TverskyLoss does not leave out void"),
        (SMP.SoftCrossEntropyLoss(smooth_factor=0.1), "SoftCrossEntropyLoss does not leave out void"),
        (SMP.LovaszLoss("multiclass"), "LovaszLoss does not leave out void.*its value depends on their logits"),
        (SMP.FocalLoss("multiclass"), "FocalLoss does not leave out void.*its value depends on their logits"),
        (SMP.FocalLoss("multiclass", ignore_index=1), "FocalLoss has ignore_index 1; set ignore_index to 255"),
        (
            SumLoss(
                C, [{"class_path": "segmentation_models_pytorch.losses.FocalLoss", "init_args": {"mode": "multiclass"}}], 100
            ),
            "SumLoss does not leave out void.*its FocalLoss depends",  # although the warm-up leaves it out of the sum
        ),
        (CrossEntropyLoss(ignore_index=0), "CrossEntropyLoss has ignore_index 0"),
        (TakesIndex(), "TakesIndex has ignore_index -1; it cannot be set; leave out the pixels where target == 255"),
        (Foreign(nn.functional.cross_entropy), "Foreign does not leave out void.*in its forward"),
        (Foreign(lambda z, y: z.mean() + 0 * z.gather(1, y[:, None]).mean()), "Foreign does not leave out void"),
        (Foreign(lambda z, y: z.mean() * torch.where(y == 255, math.nan, 1.0).mean()), "its value is nan"),
        (
            nn.CrossEntropyLoss(torch.ones(3), ignore_index=255),
            r"CrossEntropyLoss fails for logits \(2, 4, 32, 32\).*weight",
        ),
        (CrossEntropyLoss(weight=[1.0, 2.0]), "CrossEntropyLoss: weight: found 2 weights, expected 4, one per class"),
        (nn.BCEWithLogitsLoss(), "BCEWithLogitsLoss fails for logits"),
        (nn.MSELoss(), "MSELoss fails for logits"),
        (SMP.DiceLoss("binary"), "DiceLoss fails for logits"),
        (nn.CrossEntropyLoss(ignore_index=255, reduction="none"), r"shape \(2, 32, 32\), expected a scalar; set its red"),
        (Foreign(lambda z, y: void_cross_entropy(z, y)[None]), r"shape \(1,\), expected a scalar"),
        (Foreign(lambda z, y: {"loss": z.mean()}), "Foreign returns dict, expected a scalar tensor"),
        (Foreign(lambda z, y: void_cross_entropy(z, y).item()), "Foreign returns float"),
        (Foreign(lambda z, y: (z.argmax(1) == y).float().mean()), "returns a value without gradient"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_unfit_losses_are_named_before_training(objective, message):
    with pytest.raises(ValueError, match="objective: .*" + message) as caught:
        check_objective(objective, C, torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_two_classes_are_not_taken_for_two_images():
    with pytest.raises(ValueError, match="MSELoss fails for logits"):
        check_objective(nn.MSELoss(), 2, torch.device("cpu"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "objective",
    [
        nn.CrossEntropyLoss(ignore_index=255),
        *(
            kind("multiclass", ignore_index=255)
            for kind in (SMP.DiceLoss, SMP.JaccardLoss, SMP.TverskyLoss, SMP.LovaszLoss, SMP.FocalLoss)
            if "ignore_index" in inspect.signature(kind).parameters  # not all of SMP 0.5
        ),
        SMP.SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=255),
        Foreign(void_cross_entropy),
        Foreign(lambda z, y: void_cross_entropy(nn.functional.avg_pool2d(z, 64), y[:, ::64, ::64])),  # needs 64 pixels
        Foreign(lambda z, y: void_cross_entropy(nn.functional.dropout(z), y)),
        Foreign(lambda z, y: void_cross_entropy(z, y) * math.nan),  # not the fault of void pixels
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_losses_that_leave_out_void_pass(objective):
    before = torch.get_rng_state()
    check_objective(objective, C, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_own_objectives_pass_unchanged(name):
    loss = ready(name)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    check_objective(loss, C, torch.device("cpu"))
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


def test_a_loss_that_counts_all_pixels_by_intent_gets_a_warning():
    with pytest.warns(UserWarning, match="its value depends on their logits.*unless this is intended"):
        check_objective(Foreign(lambda z, y: void_cross_entropy(z, y) + z.square().mean()), C, torch.device("cpu"))


def test_an_objective_that_cannot_be_copied_is_not_checked():
    class Single(nn.CrossEntropyLoss):
        def __deepcopy__(self, memo):
            raise TypeError("one of a kind")

    check_objective(Single(), C, torch.device("cpu"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (nn.functional.cross_entropy, "objective: cross_entropy cannot be called without arguments"),
        (SMP.DiceLoss, "objective: DiceLoss cannot be called without arguments.*'mode'"),
        (lambda: 3, "returns int; expected a torch.nn.Module"),
    ],
)
def test_an_objective_is_a_module_or_builds_one(build, message):
    with pytest.raises(ValueError, match=message):
        build_objective(build)
    assert type(build_objective(partial(SMP.DiceLoss, "multiclass"))) is SMP.DiceLoss
