"""Margin offsets: the formulas in plain Python, values of the authors' implementation, and invariances."""

import math

import numpy as np
import pytest
import torch
from conftest import golden_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from mcseg.margins import MarginOffsets, margin_offsets

COUNTS = st.lists(st.integers(1, 10**9), min_size=2, max_size=30)


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
def test_values_of_the_authors_implementation(number):
    case = golden_cases()[number]
    offsets = margin_offsets(case["class_pixels"], tau=float(case["tau"]), upsilon=float(case["upsilon"]))
    assert_close(offsets, case["foreground_offsets"], case["background_offsets"])


@settings(deadline=None, max_examples=50)
@given(COUNTS, st.floats(0.01, 1000), st.floats(1, 10))
def test_ijcv2022_is_the_formula_and_linear_in_tau(counts, tau, upsilon):
    offsets = margin_offsets(counts, tau=tau, upsilon=upsilon)
    assert_close(offsets, *by_hand(counts, tau, upsilon), rtol=1e-11)
    assert min(offsets.foreground.min(), offsets.background.min()) > 0
    one = margin_offsets(counts, tau=1.0, upsilon=upsilon)
    assert_close(offsets, one.foreground * tau, one.background * tau)


@settings(deadline=None, max_examples=50)
@given(COUNTS, st.floats(0.01, 100), st.integers(2, 10**6))
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
def test_invalid_arguments_are_refused(counts, settings, message):
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
