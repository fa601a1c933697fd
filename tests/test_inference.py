"""Inference on whole images against naive averages on full canvases; memory measured in a separate process."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mcseg.evaluation import inference
from mcseg.evaluation.inference import Inference, labels_at, window_starts


def convolution(classes=5, kernel=3):
    """Create a random convolution; like the networks, it scales uint8 images."""
    layer = nn.Conv2d(3, classes, kernel, padding=kernel // 2).requires_grad_(False)
    layer.weight *= 8
    return lambda image: layer(image / 255 if image.dtype == torch.uint8 else image)


class Recorder:
    def __init__(self, network):
        self.network, self.shapes = network, []

    def __call__(self, image):
        self.shapes.append(tuple(image.shape))
        return self.network(image)


def starts(length, window, overlap):
    stride = max(1, math.floor(window * (1 - overlap) + 1e-6))
    count = math.ceil((length - window) / stride) + 1
    return [0] if count == 1 else [math.floor(i * (length - window) / (count - 1) + 1e-9) for i in range(count)]


def hann(length):
    return torch.tensor([0.01 + 0.99 * (0.5 - 0.5 * math.cos(2 * math.pi * (i + 0.5) / length)) for i in range(length)])


def naive(network, image, size, window=None, overlap=0.5, scales=(1.0,), flip=False):
    """Sum probabilities (N,C,height,width) with a separate full canvas for each scale and mirror image."""
    total = 0
    for scale in scales:
        height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
        scaled = image.contiguous(memory_format=torch.channels_last)  # planar uint8 images fail when one pixel wide
        scaled = F.interpolate(scaled, (height, width), mode="bilinear", antialias=True) if scale != 1 else image
        tall, wide = (height, width) if window is None else (min(window[0], height), min(window[1], width))
        for mirrored in (False, True)[: 1 + flip]:
            canvas, weights = 0, torch.zeros(height, width)
            for top in starts(height, tall, overlap):
                for left in starts(width, wide, overlap):
                    tile = scaled[:, :, top : top + tall, left : left + wide]
                    probabilities = network(tile.flip(-1)).softmax(1).flip(-1) if mirrored else network(tile).softmax(1)
                    weight = hann(tall)[:, None] * hann(wide)
                    around = (left, width - left - wide, top, height - top - tall)
                    canvas = canvas + F.pad(probabilities * weight, around)
                    weights += F.pad(weight, around)
            assert (weights > 0).all()
            total = total + F.interpolate(canvas / weights, size, mode="bilinear", align_corners=False)
    return total


def assert_argmax(labels, probabilities):
    """Check that labels are the argmax, except where two classes are equal up to rounding."""
    assert labels.dtype == torch.uint8
    assert labels.shape == (len(probabilities), *probabilities.shape[-2:])
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear].long(), probabilities.argmax(1)[clear])


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "strip"), [(3, 5), (3, 23), (32, 4096)])
@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((41, 53), (41, 53), {"window": (8, 11)}),
        ((41, 53), (83, 60), {"window": (8, 11), "overlap": 0.3}),
        ((41, 53), (17, 20), {"window": (16, 9), "overlap": 0.75, "flip": True}),
        ((41, 53), (5, 90), {"window": (7, 100), "overlap": 0.0}),
        ((41, 53), (41, 53), {"window": (100, 7), "scales": (0.5, 1.0, 1.5), "flip": True}),
        ((40, 31), (43, 29), {"window": (13, 12), "scales": (0.4, 1.0, 1.7), "flip": True}),
        ((33, 47), (33, 47), {"flip": True}),
        ((33, 47), (61, 45), {"scales": (0.5, 1.25)}),
        ((33, 47), (3, 2), {"window": (6, 6), "scales": (0.01, 2.0)}),
        ((1, 1), (4, 4), {"window": (2, 2), "scales": (1.0, 3.0), "flip": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_labels_equal_those_of_a_naive_average(shape, size, options, dtype, rows, strip, monkeypatch):
    monkeypatch.setattr(inference, "_ROWS", rows)
    monkeypatch.setattr(inference, "_STRIP", strip)
    network = convolution()
    image = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    if dtype == torch.float32:
        image = image / 255
    expected = naive(network, image, size, **options)
    for batch in (1, 3):
        assert_argmax(Inference(**options, batch=batch)(network, image, size), expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_settings_give_the_naive_average(data):
    side = st.integers(1, 30)
    shape, size, window = (data.draw(st.tuples(side, side)) for _ in range(3))
    options = {
        "window": data.draw(st.sampled_from([None, window])),
        "overlap": data.draw(st.floats(0, 0.8)),
        "scales": (1.0, data.draw(st.floats(0.3, 2))),
        "flip": data.draw(st.booleans()),
    }
    torch.manual_seed(data.draw(st.integers(0, 99)))
    network, image = convolution(), torch.rand(1, 3, *shape)
    expected = naive(network, image, size, **options)
    labels = Inference(**options, batch=data.draw(st.integers(1, 4)))(network, image, size).long()
    first = expected.amax(1)
    assert (first - expected.gather(1, labels[:, None])[:, 0] < 1e-5).all()


@pytest.mark.parametrize("window", [None, (33, 47), (60, 100)])
@pytest.mark.parametrize("size", [(33, 47), (70, 41)])
def test_one_window_is_one_forward_pass(window, size):
    network = Recorder(convolution())
    image = torch.randint(0, 256, (2, 3, 33, 47), dtype=torch.uint8)
    labels = Inference(window=window)(network, image, size)
    assert network.shapes == [(2, 3, 33, 47)]
    resized = F.interpolate(network(image), size, mode="bilinear", align_corners=False)
    assert torch.equal(labels.long(), resized.argmax(1))
    assert labels.dtype == torch.uint8


@pytest.mark.parametrize("size", [(13, 29), (4, 5), (50, 9)])
def test_bands_do_not_change_the_labels(size, monkeypatch):
    logits = torch.randn(2, 4, 13, 29)
    expected = F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(labels_at(logits, size).long(), expected)
    monkeypatch.setattr(inference, "_BAND", 3 * 2 * 4 * size[1])  # three rows per band
    assert torch.equal(labels_at(logits, size).long(), expected)


@pytest.mark.parametrize("window", [(1, 1), (5, 64), (16, 16), (30, 7)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_tiling_does_not_change_a_pointwise_network(window, overlap):
    network = convolution(kernel=1)
    image = torch.rand(1, 3, 37, 41)
    labels = Inference(window=window, overlap=overlap, batch=5, flip=True)(network, image, (37, 41))
    assert_argmax(labels, network(image).softmax(1))


def test_constant_network():
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0]).view(1, 4, 1, 1)
    settings = Inference(window=(9, 8), scales=(0.5, 1.0, 1.5), flip=True)
    labels = settings(lambda image: logits.expand(len(image), -1, *image.shape[-2:]), torch.rand(2, 3, 40, 50), (63, 77))
    assert (labels == 2).all()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_weights_are_positive_and_sum_to_one(overlap):
    starts = window_starts(101, 20, overlap)
    weights = inference._window_weights(101, 20, starts)
    assert (weights > 0).all()
    total = torch.zeros(101, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + 20] += weight
    torch.testing.assert_close(total, torch.ones_like(total))
    assert torch.equal(inference._window_weights(20, 20, [0]), torch.ones(1, 20, dtype=torch.float64))


@given(
    length=st.integers(1, 3000),
    share=st.floats(0, 1),
    overlap=st.floats(0, 0.99),
)
def test_window_starts(length, share, overlap):
    window = max(1, round(share * length))
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(1 <= step <= max(1, window * (1 - overlap) + 1e-3) for step in steps)  # ascending, without gaps
    assert max(steps, default=0) - min(steps, default=0) <= 1


def test_window_starts_by_hand():
    assert window_starts(10, 10, 0.5) == [0]
    assert window_starts(11, 10, 0.5) == [0, 1]
    assert window_starts(20, 10, 0.5) == [0, 5, 10]
    assert window_starts(22, 10, 0.5) == [0, 4, 8, 12]
    assert window_starts(768 * 5 // 3, 768, 1 / 3) == [0, 512]


@pytest.mark.parametrize(("batch", "forwards"), [(1, 15), (2, 9), (5, 3), (9, 3)])
def test_each_window_passes_once_per_scale_and_mirroring(batch, forwards):
    network, image = Recorder(convolution()), torch.rand(2, 3, 20, 30)
    Inference(window=(10, 10), batch=batch)(network, image, (20, 30))  # 3 rows of 5 windows
    assert len(network.shapes) == forwards
    assert sum(shape[0] for shape in network.shapes) == 2 * 15
    network.shapes.clear()
    Inference(window=(10, 10), batch=batch, scales=(0.5, 1.0), flip=True)(network, image, (20, 30))
    assert sum(shape[0] for shape in network.shapes) == 2 * 2 * (15 + 2)


@pytest.mark.parametrize("scales", [(0.5, 1.5), (1.0,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_network_gets_the_dtype_of_the_image(dtype, scales):
    seen = set()

    def network(image):
        seen.add(image.dtype)
        return image.float()

    Inference(window=(8, 8), scales=scales)(network, torch.ones(1, 3, 12, 20).to(dtype), (12, 20))
    assert seen == {dtype}


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 5), (20, 30)])
def test_uint8_images_are_resized_like_float_images(size):
    image = torch.randint(0, 256, (2, 3, 10 * size[0], 10 * size[1]), dtype=torch.uint8)
    scaled = inference._rescale(image, 0.1)
    assert scaled.dtype == torch.uint8
    assert scaled.shape[-2:] == size
    assert (scaled.float() - inference._rescale(image.float(), 0.1)).abs().max() < 1.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype):
    full, image = convolution(), torch.rand(1, 3, 21, 30)

    def network(image):
        return full(image).to(dtype)

    options = {"window": (9, 12), "scales": (1.0, 1.5)}
    labels = Inference(**options)(network, image, (30, 40))
    assert_argmax(labels, naive(lambda image: network(image).float(), image, (30, 40), **options))


def test_coarse_logits_are_resized_to_the_window():
    fine = convolution()
    image = torch.rand(1, 3, 32, 48)

    def coarse(image):
        return F.avg_pool2d(fine(image), 4)

    def resized(image):
        return F.interpolate(coarse(image), image.shape[-2:], mode="bilinear", align_corners=False)

    labels = Inference(window=(16, 16))(coarse, image, (32, 48))
    assert_argmax(labels, naive(resized, image, (32, 48), window=(16, 16)))


def test_labels_do_not_depend_on_gradient_mode():
    layer, image = nn.Conv2d(3, 4, 3, padding=1), torch.rand(1, 3, 20, 20)
    settings = Inference(window=(8, 8), flip=True)
    with torch.no_grad():
        expected = settings(layer, image, (20, 20))
    assert torch.equal(settings(layer, image, (20, 20)), expected)
    with torch.inference_mode():
        assert torch.equal(settings(layer, image, (20, 20)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0, 5)}, r"window: found \(0, 5\), expected \(height, width\)"),
        ({"window": (5,)}, r"window: found \(5,\)"),
        ({"overlap": 1.0}, "overlap: found 1.0"),
        ({"overlap": -0.1}, "overlap: found -0.1"),
        ({"overlap": math.nan}, "overlap: found nan"),
        ({"scales": ()}, r"scales: found \(\)"),
        ({"scales": (1.0, 0.0)}, "scales: found"),
        ({"scales": (math.inf,)}, "scales: found"),
        ({"batch": 0}, "batch: found 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Inference(**options)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"image: found shape \(3, 4, 4\), expected \(N, B, H, W\)"):
        Inference()(convolution(), torch.rand(3, 4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"size: found \(0, 4\)"):
        Inference()(convolution(), torch.rand(1, 3, 4, 4), (0, 4))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of the memory from Linux' /proc")
@pytest.mark.parametrize("taller", [True, False], ids=["height", "width"])
def test_memory_does_not_grow_with_the_image(taller):
    script = """
import re, sys, torch
from pathlib import Path
from mcseg.evaluation import inference
from mcseg.evaluation.inference import Inference

torch.set_num_threads(1)  # threads on shared cores would wait for each other
# not ru_maxrss, which a child inherits from its parent
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
factors = torch.linspace(-1, 1, 19).view(1, 19, 1, 1)
settings = Inference(window=(384, 384), overlap=0.0, scales=(0.5, 1.0, 1.5), flip=True)
inference._STRIP = 800
start = peak()
for size in ((1000, 800), (2400, 800) if sys.argv[1] == "True" else (1000, 1920)):
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        settings(lambda x: x[:, :1] / 255 * factors, image, size)
    print(peak() - start)
"""
    # by default glibc keeps some freed blocks; with this threshold it returns them to the system
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script, str(taller)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    low, large = (float(line) for line in output.split())
    kept = 4 * 19 * (384 + 34) * (400 + 800 + 1200) / 2**20  # MB by the formula of the docstring: 73
    assert low < kept + 120  # activations, bands, libraries that torch loads at the first call
    images = 3 * 1400 * 800 * (0.25 + 1 + 2.25 + 1) / 2**20  # growth of image, scaled copies and a temporary: 14 MB
    assert large - low < images + 10  # probabilities of the whole image would grow by 284 MB


@pytest.mark.parametrize("settings", [{}, {"flip": True}], ids=["plain", "mirrored"])
def test_more_than_256_classes_are_refused(settings):
    with pytest.raises(ValueError, match="found 257 classes"):
        Inference(**settings)(lambda image: image.new_zeros(1, 257, 4, 4), torch.zeros(1, 3, 4, 4), (4, 4))
