"""Bounds: values by hand, slow versions of their formulas, and coverage in simulations."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mcseg.evaluation.bounds import held_out_iou, iou_lower_bounds, margin_bound, miou_lower_bound, optimal_offsets
from mcseg.margins import MarginOffsets, margin_offsets

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import coverage

CAMVID = [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385, 184967]


def offsets(foreground, background):
    return MarginOffsets(*(torch.tensor(values, dtype=torch.float64) for values in (foreground, background)))


def close(actual, expected, rtol=1e-9, atol=0.0):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol)


class TestMarginBound:
    def test_by_hand(self):
        bound = margin_bound([600, 400], [60, 100], [40, 30], offsets([2.0, 4.0], [1.0, 5.0]), 0.25, delta=0.1)
        deviation = math.sqrt(math.log(40) / 2)
        e = [math.sqrt(0.6 / 1000) * (0.25 + deviation), math.sqrt(0.4 / 1000) * (0.125 + deviation)]
        f = [math.sqrt(0.4 / 1000) * (0.5 + deviation), math.sqrt(0.6 / 1000) * (0.1 + deviation)]
        iou = [(0.6 - 0.06 - e[0]) / (0.6 + 0.04 + f[0]), (0.4 - 0.1 - e[1]) / (0.4 + 0.03 + f[1])]
        close(bound.foreground_error, e)
        close(bound.background_error, f)
        close(bound.iou, iou)
        assert bound.miou == pytest.approx(sum(iou) / 2)

    def test_units_of_equal_pixels_count_once(self):
        """100 images of 50 equal pixels give the bound of 100 independent pixels."""
        one = margin_bound([60, 40], [6, 4], [4, 3], offsets([2.0, 3.0], [3.0, 4.0]), 0.5)
        many = margin_bound([3000, 2000], [300, 200], [200, 150], offsets([2.0, 3.0], [3.0, 4.0]), 0.5, unit_pixels=50)
        close(many.iou, one.iou)
        assert 0 < one.miou < margin_bound([3000, 2000], [300, 200], [200, 150], offsets([2.0, 3.0], [3.0, 4.0]), 0.5).miou

    def test_a_class_without_pixels_is_left_out_and_an_offset_of_zero_gives_the_bound_zero(self):
        bound = margin_bound([500, 500, 0], [0, 0, 0], [0, 0, 0], offsets([2.0, 0.0, 0.0], [2.0, 1.0, 0.0]), 0.1)
        assert bound.iou[2].isnan()
        assert bound.iou[1] == 0
        assert bound.miou == pytest.approx(float(bound.iou[0]) / 2)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"misses": [601, 0]}, "above the number of pixels"),
            ({"false_alarms": [0, 601]}, "above the number of pixels"),
            ({"misses": [1, 2, 3]}, "shapes"),
            ({"complexity": 0.0}, "complexity"),
            ({"delta": 1.0}, "delta"),
            ({"unit_pixels": 1001}, "unit_pixels"),
            ({"offsets": offsets([-1.0, 1.0], [1.0, 1.0])}, "negative"),
        ],
    )
    def test_invalid_arguments_are_refused(self, change, message):
        arguments = {
            "misses": [0, 0],
            "false_alarms": [0, 0],
            "offsets": offsets([1.0, 1.0], [1.0, 1.0]),
            "complexity": 1.0,
        } | change
        with pytest.raises(ValueError, match=message):
            margin_bound([600, 400], **arguments)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.integers(100, 10**6), min_size=2, max_size=6), st.randoms(use_true_random=False))
    def test_the_bound_is_monotonic_in_errors_margins_units_and_confidence(self, counts, random):
        total = sum(counts)
        misses = [random.randint(0, n // 3) for n in counts]
        alarms = [random.randint(0, (total - n) // 3) for n in counts]
        margins = offsets([random.uniform(0.5, 3) for _ in counts], [random.uniform(0.5, 3) for _ in counts])
        bound = margin_bound(counts, misses, alarms, margins, 1.0).iou
        assert (margin_bound(counts, [m + 1 for m in misses], alarms, margins, 1.0).iou <= bound).all()
        assert (margin_bound(counts, misses, [a + 1 for a in alarms], margins, 1.0).iou <= bound).all()
        assert (margin_bound(counts, misses, alarms, margins, 1.1).iou <= bound).all()
        assert (margin_bound(counts, misses, alarms, margins, 1.0, delta=0.01).iou <= bound).all()
        assert (margin_bound(counts, misses, alarms, margins, 1.0, unit_pixels=7).iou <= bound).all()
        wider = MarginOffsets(margins.foreground * 1.1, margins.background * 1.1)
        assert (margin_bound(counts, misses, alarms, wider, 1.0).iou >= bound).all()

    def test_holds_for_trained_linear_scores(self):
        """Bound linear scores of three classes in the plane, |x| <= 2, |w| <= 4, K = 3 * 4 * 2 (docs/theory/bounds.md)."""
        centres = 1.5 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
        share = torch.tensor([0.6, 0.3, 0.1])

        def pixels(number, generator):
            label = torch.multinomial(share, number, True, generator=generator)
            x = centres[label] + 0.4 * torch.randn(number, 2, generator=generator)
            return x * (2 / x.norm(dim=1, keepdim=True)).clamp(max=1), label

        def errors(weights, x, label, foreground, background):
            scores = x @ weights.T
            rival = torch.stack([scores[:, [j for j in range(3) if j != i]].amax(1) for i in range(3)], 1)
            margin, own = scores - rival, torch.nn.functional.one_hot(label, 3).bool()
            return (own & (margin <= foreground)).sum(0), (~own & (margin > -background)).sum(0)

        bounds, truths = [], []
        for seed in range(12):
            generator = torch.Generator().manual_seed(seed)
            x, label = pixels(100_000, generator)
            n = torch.bincount(label, minlength=3)
            weights = torch.zeros(3, 2, requires_grad=True)
            for _ in range(30):  # trained on the pixels of the bound
                torch.nn.functional.cross_entropy(8 * x[:2000] @ weights.T, label[:2000]).backward()
                weights = (weights - weights.grad).detach().requires_grad_()
            weights = 4 * weights.detach() / weights.detach().norm(dim=1).max()
            margins = margin_offsets(n, "miou", max_margin=2.0)
            missed, alarmed = errors(weights, x, label, margins.foreground, margins.background)
            bound = margin_bound(n, missed, alarmed, margins, 24.0)
            fresh, fresh_label = pixels(100_000, generator)
            missed, alarmed = errors(weights, fresh, fresh_label, torch.zeros(3), torch.zeros(3))
            of_fresh = torch.bincount(fresh_label, minlength=3)
            bounds.append(bound.iou)
            truths.append((of_fresh - missed) / (of_fresh + alarmed))
        bounds, truths = torch.stack(bounds), torch.stack(truths)
        assert (bounds <= truths).all(1).double().mean() >= 0.95
        assert bounds[:, 0].mean() > 0.5, "else the bound is too low for the test to mean anything"

    def test_pixels_of_an_image_are_not_independent(self):
        """For 20 images of 10,000 equal pixels with random labels, the bound needs `unit_pixels` to hold."""
        images, each = 20, 10_000
        torch.manual_seed(0)
        label = torch.arange(images) % 2
        x = torch.eye(images, dtype=torch.float64)  # one direction per image, |x| = 1
        weights = torch.stack([(label == i).double() - 0.5 for i in range(2)]) @ x  # margin +-1 everywhere
        scores = x @ weights.T
        assert (scores.argmax(1) == label).all()
        complexity = 2 * float(weights.norm(dim=1).max())  # C B R
        n = torch.tensor([images * each // 2] * 2)
        none, margins = torch.zeros(2), offsets([0.99, 0.99], [0.99, 0.99])
        as_pixels = margin_bound(n, none, none, margins, complexity)
        as_images = margin_bound(n, none, none, margins, complexity, unit_pixels=each)
        truth = 1 / 3  # fresh labels are random: half of each class is missed, and there are as many false alarms
        assert as_pixels.miou > 0.8
        assert as_images.miou <= truth


class TestOptimalOffsets:
    @settings(deadline=None, max_examples=10)
    @given(st.lists(st.integers(1, 10**4), min_size=2, max_size=12))
    def test_closed_form_for_small_error_terms(self, counts):
        counts = [10**13 * n for n in counts]
        closed = margin_offsets(counts, "miou")
        total = float(closed.foreground.sum() + closed.background.sum())
        found = optimal_offsets(counts, total, 1.0)
        close(torch.cat(found), torch.cat(closed), rtol=1e-3)
        assert float(torch.cat(found).sum()) == pytest.approx(total)

    def test_margin_errors_enter_by_their_first_order_weights(self):
        counts, misses, alarms = [6e9, 3e9, 1e9], [3e8, 9e8, 5e8], [8e8, 2e8, 9e8]
        found = optimal_offsets(counts, 6.0, 1.0, misses, alarms)
        n, a, b = (torch.tensor(values, dtype=torch.float64) for values in (counts, misses, alarms))
        iou, weight = (n - a) / (n + b), 1 / (n + b)
        expected = torch.cat([weight.sqrt() * n**0.25, (weight * iou).sqrt() * (n.sum() - n) ** 0.25])
        close(torch.cat(found), 6 * expected / expected.sum(), rtol=1e-3)

    def test_optimum_is_better_than_its_neighbours_for_large_error_terms(self):
        counts, misses, alarms = [6000, 3000, 1000], [300, 200, 100], [100, 200, 300]
        best = optimal_offsets(counts, 60.0, 1.0, misses, alarms)
        found = torch.cat(best)
        at_best = margin_bound(counts, misses, alarms, best, 1.0)
        assert at_best.iou.min() > 0
        for i in range(6):
            for j in range(6):
                moved = found.clone()
                moved[i] += 0.1
                moved[j] -= 0.1
                neighbour = MarginOffsets(*moved.chunk(2))
                assert margin_bound(counts, misses, alarms, neighbour, 1.0).miou <= at_best.miou + 1e-12

    def test_numbers_of_the_documentation(self):
        n = torch.tensor(CAMVID, dtype=torch.float64)
        cost = torch.stack([n**-0.5, (n.sum() - n).sqrt() / n])
        least = cost.sqrt().sum() ** 2

        def terms(found):
            return cost / torch.stack(list(found)), torch.stack(list(found))

        error, margin = terms(margin_offsets(n, "miou"))
        assert float(error.sum() * margin.sum() / least) == pytest.approx(1)
        assert float(cost.sum() * 22 / least) == pytest.approx(1.82, abs=0.005)
        error, margin = terms(margin_offsets(n, "ijcv2022"))
        assert float(error.sum() * margin.sum() / least) == pytest.approx(470_035, rel=1e-5)
        each = error.sum(1) * margin.sum(1)
        assert float(each.sqrt().sum() ** 2 / least) == pytest.approx(1.92, abs=0.005)
        foreground, background = (each / cost.sqrt().sum(1) ** 2).tolist()
        assert foreground == pytest.approx(3.24, abs=0.005)
        assert background == pytest.approx(1.53, abs=0.005)
        closed = margin_offsets(CAMVID, "miou")
        whole = optimal_offsets(CAMVID, float(torch.cat(closed).sum()), 100.0)
        bounds = [margin_bound(CAMVID, [0] * 11, [0] * 11, found, 100.0) for found in (closed, whole)]
        assert [round(bound.miou, 2) for bound in bounds] == [0.06, 0.33]
        assert (bounds[1].iou == 0).nonzero().flatten().tolist() == sorted(n.argsort()[:5].tolist())
        text = (Path(__file__).parents[1] / "docs" / "theory" / "bounds.md").read_text()
        for number in ("1.82", "1.92", "1.53", "3.24", "470,035"):
            assert f"| {number} |" in text

    def test_invalid_arguments_are_refused(self):
        with pytest.raises(ValueError, match="without pixels"):
            optimal_offsets([5, 5, 0], 1.0, 1.0)
        with pytest.raises(ValueError, match="total_margin"):
            optimal_offsets([5, 5], 0.0, 1.0)


def world(seed=0, images=60):
    rng = np.random.default_rng(seed)
    return coverage.World.draw(rng).images(images, rng)


def refuted(hits, union, pixels, v, classes, level):
    """Return whether the bets refute IoU <= v, by the products of the docstring."""
    products = []
    for k in range(12):
        product = 1.0
        for h, u in zip(hits, union, strict=True):
            product *= 1 + 2.0**-k * (h / v - u) / pixels
        products.append(product)
    return sum(products) / 12 >= classes / (1 - level)


class TestConcentration:
    def test_one_perfect_image_by_hand(self):
        """Solve 1 + b (1/v - 1) = C / (1 - level) with the mean bet b = (2 - 2^-11) / 12."""
        counts = np.full((1, 3, 1), 100)
        bet = (2 - 2**-11) / 12
        close(iou_lower_bounds(counts, 0.9, "pixel", 100), [1 / (1 + 9 / bet)])

    @pytest.mark.parametrize("seed", range(3))
    def test_the_product_of_the_bets_reaches_its_threshold_at_the_bound(self, seed):
        counts = world(seed)
        found = iou_lower_bounds(counts, 0.95, "pixel", 100_050).tolist()
        classes, informative = counts.shape[2], 0
        for k, bound in enumerate(found):
            hits, target, predicted = counts[:, :, k].T.tolist()
            union = [t + p - h for h, t, p in zip(hits, target, predicted, strict=True)]
            if not any(union):
                assert math.isnan(bound)
            elif bound:
                informative += 1
                assert bound < sum(hits) / sum(union)
                assert refuted(hits, union, 100_050, bound * 0.9999, classes, 0.95)
                assert not refuted(hits, union, 100_050, bound * 1.0001, classes, 0.95)
            else:
                assert not refuted(hits, union, 100_050, 1e-6, classes, 0.95)
        assert informative
        assert miou_lower_bound(counts, 0.95, "concentration", largest_pixels=100_050) == pytest.approx(np.nanmean(found))

    @settings(deadline=None, max_examples=15)
    @given(st.integers(0, 10**6), st.floats(0.5, 0.99))
    @example(46135, 0.5)
    def test_decreases_with_errors_and_level_and_ignores_the_order(self, seed, level):
        rng = np.random.default_rng(seed)
        counts = world(seed, images=20)
        found = iou_lower_bounds(counts, level, "pixel", 200_100).nan_to_num(-1)
        worse = counts.copy()
        image, k = rng.integers(20), rng.integers(counts.shape[2])
        other = (k + 1) % counts.shape[2]
        room = worse[image, 1].sum() - (worse[image, 1:, other].sum() - worse[image, 0, other])  # pixels outside its union
        lost = min(worse[image, 0, k] // 2, room)  # hits become misses, and false alarms of another class
        worse[image, [0, 2], k] -= lost
        worse[image, 2, other] += lost
        assert (iou_lower_bounds(worse, level, "pixel", 200_100).nan_to_num(-1) <= found + 1e-12).all()
        assert (iou_lower_bounds(counts, level + 0.005, "pixel", 200_100).nan_to_num(-1) <= found + 1e-12).all()
        classes = rng.permutation(counts.shape[2])
        mixed = torch.from_numpy(counts[rng.permutation(20)][:, :, classes].copy())
        close(iou_lower_bounds(mixed, level, "pixel", 200_100).nan_to_num(-1), found[classes], atol=1e-9)

    @pytest.mark.parametrize("images", [20, 50])
    def test_holds_for_images_of_different_sizes(self, images):
        """The largest image of the set does not limit the images of the source; with equal weights no limit is needed."""
        source, sets, rng = coverage.TwoSizes(), 200, np.random.default_rng(images)
        bounds = {"image": [], "pixel": [], "largest of the set": []}
        for _ in range(sets):
            counts = source.images(images, rng)
            limits = {"pixel": source.largest, "largest of the set": int(counts[:, 1].sum(1).max())}
            bounds["image"].append(miou_lower_bound(counts, 0.95, "concentration", weight="image"))
            for name, limit in limits.items():
                bounds[name].append(miou_lower_bound(counts, 0.95, "concentration", largest_pixels=limit))
        truth = {"image": source.miou("image")}
        held = {name: (np.array(bounds[name]) <= truth.get(name, source.miou("pixel"))).sum() for name in bounds}
        at_least = scipy.stats.binom.ppf(0.001, sets, 0.95)
        assert held["image"] >= at_least
        assert held["pixel"] >= at_least
        assert held["largest of the set"] < at_least, "the source is too easy, so the test shows nothing"
        assert np.mean(bounds["image"]) > 0.4, "else the bound is too low for the test to mean anything"

    def test_an_image_above_largest_pixels_is_refused(self):
        with pytest.raises(ValueError, match="found 99, but an image has 100"):
            iou_lower_bounds(np.full((2, 3, 1), 100), 0.95, "pixel", 99)
        with pytest.raises(ValueError, match="largest_pixels"):
            miou_lower_bound(np.full((2, 3, 1), 100), method="concentration")


def slow_bootstrap(counts, level, resamples, seed):
    """Compute the studentised bootstrap of the docstring, one resample at a time."""

    def estimate(images):
        hits, union = images[:, 0].astype(float), (images[:, 1] + images[:, 2] - images[:, 0]).astype(float)
        present = union.any(0)
        hits, union = hits[:, present], union[:, present]
        iou = hits.sum(0) / union.sum(0)
        parts = [
            sum((h[i] - iou[i] * u[i]) / union[:, i].mean() for i in range(len(iou))) / len(iou)
            for h, u in zip(hits, union, strict=True)
        ]
        return iou, union, math.sqrt(np.var(parts, ddof=1) / len(parts))

    iou, union, error = estimate(counts)
    order = np.argsort(
        [
            sum((h[i] - iou[i] * u[i]) / union[:, i].mean() for i in range(len(iou)))
            for h, u in zip(counts[:, 0, counts.any((0, 1))], union, strict=True)
        ]
    )
    rng = np.random.default_rng(seed)
    studentised = []
    for times in rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples):
        again, _, its_error = estimate(np.repeat(counts[order], times, axis=0))
        studentised.append((again.mean() - iou.mean()) / its_error)
    variance = error**2
    for i in range(len(iou)):
        k = union[:, i].sum() ** 2 / (union[:, i] ** 2).sum()
        shrunk = (k * iou[i] + 1) / (k + 2)
        variance += shrunk * (1 - shrunk) / k**2 / len(iou) ** 2
    quantile = max(np.quantile(studentised, level), scipy.stats.norm.ppf(level))
    return max(0.0, iou.mean() - quantile * math.sqrt(variance))


class TestWeights:
    METHODS = ("bootstrap", "concentration")

    def test_iou_by_hand(self):
        """Use a small image with 3 of 4 pixels right, a large one with 10 of 40, and one without labels."""
        counts = np.array([[[2, 1], [2, 2], [3, 1]], [[10, 0], [20, 20], [30, 10]], [[0, 0], [0, 0], [0, 0]]])
        close(held_out_iou(counts), [12 / (3 + 40), 1 / (2 + 30)])
        close(held_out_iou(counts, "image"), [(2 / 4 + 10 / 40) / (3 / 4 + 40 / 40), (1 / 4) / (2 / 4 + 30 / 40)])

    @pytest.mark.parametrize("method", METHODS)
    def test_weights_are_equal_for_images_of_one_size(self, method):
        rng = np.random.default_rng(4)
        target = rng.multinomial(700, [0.6, 0.3, 0.1], 40)
        hits = rng.binomial(target, rng.beta(8, 2, (40, 1)))
        counts = np.stack([hits, target, hits + (target - hits)[:, [1, 2, 0]]], 1)
        limit = {"largest_pixels": 700} if method == "concentration" else {}
        of_pixels, of_images = (
            miou_lower_bound(counts, 0.9, method, weight=weight, **options)
            for weight, options in (("pixel", limit), ("image", {}))
        )
        assert of_images == pytest.approx(of_pixels, rel=1e-9)
        assert 0 < of_images < float(held_out_iou(counts).mean())
        close(held_out_iou(counts, "image"), held_out_iou(counts))

    @pytest.mark.parametrize("method", METHODS)
    def test_weight_image_ignores_the_size_of_images(self, method):
        counts = world(5, images=40)
        times = np.random.default_rng(0).integers(1, 100, (40, 1, 1))
        small, large = (miou_lower_bound(found, 0.9, method, weight="image") for found in (counts, counts * times))
        assert large == pytest.approx(small, rel=1e-6)
        assert small > 0

    def test_images_without_labels_do_not_change_the_bound(self):
        counts = world(5, images=40)
        more = np.concatenate([counts, np.zeros_like(counts[:5])])
        close(iou_lower_bounds(more, 0.9).nan_to_num(-1), iou_lower_bounds(counts, 0.9).nan_to_num(-1))


class TestBootstrap:
    @pytest.mark.parametrize("seed", [1, 2, 5])
    def test_equals_the_formula_one_resample_at_a_time(self, seed):
        counts = world(seed, images=40)
        expected = slow_bootstrap(counts, 0.9, 200, seed=3)
        assert expected > 0
        assert miou_lower_bound(counts, 0.9, resamples=200, seed=3) == pytest.approx(expected, rel=1e-6)

    def test_agrees_with_scipy_where_all_methods_agree(self):
        """With many images that contain every class, percentile, BCa and studentised intervals agree."""
        rng = np.random.default_rng(0)
        target = rng.multinomial(1000, [0.5, 0.3, 0.2], 1500)
        hits = rng.binomial(target, rng.beta(8, 2, (1500, 1)))
        counts = np.stack([hits, target, hits + (target - hits)[:, [1, 2, 0]]], 1)

        def miou(images):
            h, t, p = np.moveaxis(counts[images].sum(1 if images.ndim == 2 else 0), -2, 0)
            return (h / (t + p - h)).mean(-1)

        scipys = scipy.stats.bootstrap(
            (np.arange(1500),),
            lambda images, axis=-1: miou(images.astype(int)),
            n_resamples=2000,
            batch=50,
            confidence_level=0.95,
            alternative="greater",
            random_state=0,
        )
        estimate = miou(np.arange(1500))
        assert estimate - miou_lower_bound(counts) == pytest.approx(estimate - scipys.confidence_interval.low, rel=0.06)

    @settings(deadline=None, max_examples=20)
    @given(st.integers(0, 10**6))
    def test_decreases_with_level_is_below_the_estimate_and_ignores_the_order(self, seed):
        rng = np.random.default_rng(seed)
        counts = world(seed, images=30)
        found = [miou_lower_bound(counts, level, resamples=300) for level in (0.6, 0.9, 0.99)]
        assert np.nanmean(coverage.iou_of(counts.sum(0))) >= found[0] >= found[1] >= found[2] >= 0
        mixed = counts[rng.permutation(30)][:, :, rng.permutation(counts.shape[2])]
        # another order of classes rounds differently and may swap images of almost equal influence
        assert miou_lower_bound(mixed, 0.9, resamples=300) == pytest.approx(found[1], abs=0.02)
        again = counts[rng.permutation(30)]
        assert miou_lower_bound(again, 0.9, resamples=300) == pytest.approx(found[1], rel=1e-6, abs=1e-9)

    def test_more_images_of_the_same_kind_give_a_tighter_bound(self):
        counts = world(5, images=40)
        bounds = [miou_lower_bound(np.repeat(counts, times, axis=0)) for times in (1, 4, 16)]
        assert bounds[0] < bounds[1] < bounds[2]

    def test_one_image_gives_zero_and_perfect_images_give_less_than_one(self):
        perfect = np.zeros((30, 3, 2), dtype=np.int64)
        perfect[:, :, 0] = 900
        perfect[0, :, 1] = 100  # in one image only
        assert miou_lower_bound(perfect[:1]) == 0
        # k = 1 and the share (1 + 1) / 3 of hits, against k = 30 and 31 / 32
        variance = (2 / 9 + (31 / 32) * (1 / 32) / 900) / 4
        assert miou_lower_bound(perfect) == pytest.approx(1 - scipy.stats.norm.ppf(0.95) * math.sqrt(variance))


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        (np.ones((4, 3)), {}, r"shape \(4, 3\)"),
        (np.ones((4, 3, 2)), {}, "counts: found dtype float64"),
        (np.array([[[2], [1], [3]]]), {}, "hits"),
        (np.array([[[1, 1], [4, 1], [4, 8]]]), {}, "image 0 has 5 target pixels, but 8"),
        (np.ones((4, 3, 2), dtype=int), {"weight": "area"}, "weight: found 'area'"),
        (np.ones((4, 3, 2), dtype=int), {"largest_pixels": 9}, "largest_pixels: found 9, but the bootstrap"),
        (
            np.ones((4, 3, 2), dtype=int),
            {"method": "concentration", "weight": "image", "largest_pixels": 9},
            "largest_pixels: found 9, but the weight 'image'",
        ),
        (np.array([[[-1], [1], [3]]]), {}, "hits"),
        (np.zeros((4, 3, 2), dtype=int), {}, "no labelled pixel"),
        (np.ones((4, 3, 2), dtype=int), {"level": 1.0}, "level"),
        (np.ones((4, 3, 2), dtype=int), {"method": "magic"}, "'bootstrap', 'concentration'"),
        (np.ones((4, 3, 2), dtype=int), {"resamples": 10}, "resamples"),
    ],
)
def test_invalid_counts_and_settings_are_refused(counts, options, message):
    with pytest.raises(ValueError, match=message):
        miou_lower_bound(counts, **options)


def test_coverage_in_simulated_worlds():
    """Run a small version of benchmarks/coverage.py."""
    bounds = {name: coverage.BOUNDS[name] for name in ("bootstrap", "concentration")}
    bounds["none"] = lambda counts, level: float(np.nanmean(coverage.iou_of(counts.sum(0))))
    found = coverage.simulate(100, [60], 0.95, bounds, seed=1, truth_images=10_000)[60]
    holds = {name: (found[name] <= found["truth"]).mean() for name in bounds}
    assert holds["bootstrap"] >= 0.93
    assert holds["concentration"] >= 0.95
    assert holds["none"] < 0.8, "the estimate itself holds too often, so the test shows nothing"
    distance = {name: (found["estimate"] - found[name]).mean() for name in bounds}
    assert 0 < distance["bootstrap"] < 0.5 * distance["concentration"], "the bootstrap is not the tighter method"
