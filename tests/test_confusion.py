"""Predicted classes and confusion counts in PyTorch and Triton (on a GPU or interpreted), against NumPy and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from mcseg.kernels import Upsampling, confusion_counts, predicted_classes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def import_gpu():
    pytest.importorskip("triton")
    from mcseg.kernels import gpu

    return gpu


def kernel_predictions(logits, size=None, upsampling=None):
    size = size if upsampling else logits.shape[2:]
    height, width, align_corners = upsampling or (0, 0, False)
    preds = import_gpu().predicted_classes(
        logits.to(DEVICE), list(size), height=height, width=width, align_corners=align_corners
    )
    return preds.cpu()


def kernel_counts(preds, target, classes, ignore_index=255):
    counts = (
        import_gpu()
        .confusion_counts(preds.to(DEVICE), target.to(DEVICE), num_classes=classes, ignore_index=ignore_index)
        .cpu()
    )
    return counts[:-1].view(classes, classes), counts[-1]


PREDICT = {"pytorch": predicted_classes, "triton": kernel_predictions}
COUNT = {"pytorch": confusion_counts, "triton": kernel_counts}
each_prediction = pytest.mark.parametrize("predict", PREDICT.values(), ids=PREDICT)
each_count = pytest.mark.parametrize("count", COUNT.values(), ids=COUNT)


@pytest.mark.slow
@each_prediction
@settings(deadline=None, max_examples=20)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([2, 3, 19, 256, 300]), st.integers(1, 5), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "channels last", "cropped"]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_predicted_classes_equal_argmax_of_numpy(predict, shape, dtype, layout, ties, seed):
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    logits = (logits.round() if ties else logits).to(dtype)
    if layout == "channels last":
        logits = logits.to(memory_format=torch.channels_last)
    elif layout == "cropped":
        logits = F.pad(logits, (1, 2, 3, 1))[..., 3 : 3 + shape[2], 1 : 1 + shape[3]]
    preds = predict(logits)
    assert preds.dtype == (torch.uint8 if shape[1] <= 256 else torch.int16)
    assert preds.tolist() == np.argmax(logits.float().numpy(), 1).tolist()


@each_prediction
@pytest.mark.parametrize("shape", [(1, 4, 7), (2, 3, 2, 3, 5), (2, 3, 0, 4), (0, 3, 2, 2)], ids=str)
def test_other_numbers_of_spatial_dimensions_and_empty_images(predict, shape):
    logits = torch.randn(shape)
    assert torch.equal(predict(logits).long(), logits.argmax(1))


def test_logits_without_spatial_dimensions():
    logits = torch.randn(9, 5)
    assert torch.equal(predicted_classes(logits).long(), logits.argmax(1))


@each_prediction
def test_infinities_and_nan(predict):
    logits = torch.randn(1, 4, 1, 6)
    logits[0, 2, 0, 0] = math.inf
    logits[0, :3, 0, 1] = -math.inf
    logits[0, :, 0, 2] *= 1e38
    logits[0, 3, 0, 3] = logits[0, :, 0, 3].amax() + 1e-6
    logits[0, 1:3, 0, 5] = math.nan
    preds = predict(logits)[0, 0].tolist()
    assert preds[:5] == np.argmax(logits[0, :, 0, :5].numpy(), 0).tolist()
    assert 0 <= preds[5] < 4


@pytest.mark.slow
@each_prediction
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("classes", [5, 300])
def test_predicted_classes_of_coarse_logits(predict, align_corners, classes):
    logits = torch.randn(2, classes, 3, 4)
    full = F.interpolate(logits.double(), (9, 14), mode="bilinear", align_corners=align_corners)
    preds = predict(logits, (8, 13), Upsampling(9, 14, align_corners)).long()
    predicted_logits = full[..., :8, :13].gather(1, preds[:, None])[:, 0]
    assert preds.shape == (2, 8, 13)
    # classes may differ if rounding decides between almost equal logits
    assert float((full[..., :8, :13].amax(1) - predicted_logits).max()) < 1e-5
    assert (preds == full[..., :8, :13].argmax(1)).double().mean() > 0.99


@each_count
@settings(deadline=None, max_examples=20)
@given(
    classes=st.sampled_from([2, 3, 19, 150, 200]),
    run=st.integers(1, 900),  # consecutive pixels with equal labels; a block of the kernel has 1024 pixels
    pixels=st.integers(1, 3000),
    void=st.sampled_from([0.0, 0.2, 1.0]),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    seed=st.integers(0, 1000),
)
def test_counts_equal_the_confusion_matrix_of_scikit_learn(count, classes, run, pixels, void, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(classes, (2, pixels), generator=generator)
    target, preds = ids.repeat_interleave(run, dim=1)[:, :pixels]
    target = target.masked_fill(torch.rand(pixels, generator=generator) < void, 255)
    counts, unknown = count(preds.to(torch.uint8), target.to(dtype), classes)
    labelled = target != 255
    expected = np.zeros((classes, classes), int)
    if labelled.any():
        expected = confusion_matrix(target[labelled].numpy(), preds[labelled].numpy(), labels=range(classes))
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected.tolist()
    assert int(unknown) == 0


@each_count
def test_counts_of_noncontiguous_images(count):
    target, preds = torch.randint(4, (2, 3, 7, 50))
    counts, _ = count(preds.transpose(1, 2), target.transpose(1, 2), 4)
    assert counts.tolist() == confusion_matrix(target.flatten(), preds.flatten(), labels=range(4)).tolist()


@each_count
def test_another_ignore_index(count):
    counts, _ = count(torch.tensor([1, 1, 0, 2]), torch.tensor([-1, 1, 0, -1]), 3, -1)
    assert counts.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


@each_count
def test_counts_of_empty_images(count):
    counts, unknown = count(torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), 3)
    assert counts.tolist() == [[0] * 3] * 3
    assert int(unknown) == 0


@pytest.mark.parametrize(("preds", "target"), [([3, 0], [0, 0]), ([0, 0], [3, 0]), ([0, -1], [0, 0]), ([0, 0], [-1, 0])])
def test_ids_that_are_not_classes_are_reported(preds, target):
    preds, target = torch.tensor(preds), torch.tensor(target)
    counts, unknown = kernel_counts(preds, target, 3)
    assert int(counts.sum()) == int(unknown) == 1
    with pytest.raises(ValueError, match=r"(predictions|target): found class (3|-1), expected 0 to 2, or 255"):
        confusion_counts(preds, target, 3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised inside torch's check
def test_registered_operators_pass_opcheck():
    gpu = import_gpu()
    torch.library.opcheck(gpu.predicted_classes, (torch.randn(1, 3, 2, 3, device=DEVICE), [2, 3], 0, 0, False))
    ids = torch.randint(3, (2, 5), device=DEVICE)
    torch.library.opcheck(gpu.confusion_counts, (ids[0], ids[1], 3, 255))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA graphs")
def test_a_training_step_in_a_cuda_graph():
    """Replay gradient, predictions and counts from a CUDA graph with other inputs."""
    from mcseg.losses import default_objective

    logits = torch.randn(2, 19, 16, 16, device=DEVICE, requires_grad=True)
    target = torch.randint(19, (2, 16, 16), device=DEVICE)
    loss = default_objective()

    def step():
        preds = predicted_classes(logits)
        (gradient,) = torch.autograd.grad(loss(logits, target), logits)
        return gradient, preds, confusion_counts(preds, target, 19)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
        target.copy_(torch.randint_like(target, 19))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


@each_count
def test_an_ignore_index_outside_the_dtype_of_the_labels(count):
    """-100 wraps to 156 in uint8, but pixels of class 156 must be counted."""
    target = torch.tensor([156, 156, 3], dtype=torch.uint8)
    counts, unknown = count(torch.tensor([156, 0, 3]), target, 171, -100)
    assert counts.nonzero().tolist() == [[3, 3], [156, 0], [156, 156]]
    assert int(counts.sum()) == 3
    assert unknown == 0


def test_different_shapes_and_wrong_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        confusion_counts(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), 4)
    with pytest.raises(TypeError, match="preds.*float32"):
        confusion_counts(torch.zeros(2), torch.zeros(2, dtype=torch.int64), 4)


def test_the_target_is_not_changed():
    target = torch.tensor([0, 255, 1])
    confusion_counts(torch.tensor([0, 1, 1]), target, 2)
    assert target.tolist() == [0, 255, 1]
