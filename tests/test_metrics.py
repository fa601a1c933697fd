"""Scores against scikit-learn and hand-counted cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from mcseg.evaluation.metrics import Scores, SegmentationScores, image_counts, score


def test_hand_counted():
    #            road x3, pole x2, void, car x1, absent "sky" is class 3
    target = torch.tensor([[0, 0, 0, 1], [1, 255, 2, 0]])
    preds = torch.tensor([[0, 0, 1, 1], [0, 3, 2, 0]])
    scores = score(preds, target, 4)
    assert scores.iou[:3].tolist() == [3 / 5, 1 / 3, 1.0]
    assert math.isnan(scores.iou[3])  # predicted only under void
    assert scores.classes_averaged == 3
    assert scores.miou == pytest.approx((3 / 5 + 1 / 3 + 1) / 3, rel=1e-15)
    assert scores.pixel_accuracy == pytest.approx(5 / 7, rel=1e-15)
    assert scores.precision[:3].tolist() == [3 / 4, 1 / 2, 1.0]
    assert scores.recall[:3].tolist() == [3 / 4, 1 / 2, 1.0]
    assert scores.share.tolist() == [4 / 7, 2 / 7, 1 / 7, 0.0]


def test_a_class_with_false_alarms_only_has_iou_zero():
    scores = score(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), 3)
    assert scores.iou[:2].tolist() == [2 / 3, 0.0]
    assert scores.classes_averaged == 2
    assert scores.miou == pytest.approx(1 / 3)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(0, 10_000))
def test_against_scikit_learn(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (3, 11, 13), generator=generator)
    preds = torch.where(
        torch.rand(target.shape, generator=generator) < 0.6,
        target,
        torch.randint(0, classes, target.shape, generator=generator),
    )
    void = torch.rand(target.shape, generator=generator) < 0.2
    metric = SegmentationScores(classes)
    for p, t in zip(preds.to(torch.uint8), target.masked_fill(void, 255), strict=True):  # in several updates
        metric.update(p[None], t[None])
    kept_target, kept_preds = target[~void].numpy(), preds[~void].numpy()
    assert metric.confmat.tolist() == confusion_matrix(kept_target, kept_preds, labels=range(classes)).tolist()
    scores = metric.scores()
    expected = jaccard_score(kept_target, kept_preds, labels=range(classes), average=None, zero_division=0)
    absent = [c not in kept_target and c not in kept_preds for c in range(classes)]
    expected[absent] = math.nan
    torch.testing.assert_close(scores.iou, torch.tensor(expected), rtol=1e-12, atol=0, equal_nan=True)
    assert scores.miou == pytest.approx(float(torch.tensor(expected).nanmean()), rel=1e-12)
    assert float(metric.compute()) == pytest.approx(scores.miou, rel=1e-5)  # torchmetrics' own average agrees


def test_counts_beyond_float32_are_exact():
    confusion = torch.tensor([[2**40 + 1, 1], [0, 3]])
    scores = Scores.from_confusion(confusion)
    assert scores.recall[0] == (2**40 + 1) / (2**40 + 2)


def test_scores_without_labels():
    scores = score(torch.zeros(4, dtype=torch.long), torch.full((4,), 255), 3)
    assert math.isnan(scores.miou)
    assert scores.classes_averaged == 0


def test_deterministic_mode_needs_no_memory_per_pair_of_classes():
    # torchmetrics' own update would need 512 * 512 * 150^2 * 8 bytes = 47 GB here.
    metric = SegmentationScores(150)
    target = torch.randint(0, 150, (1, 512, 512))
    torch.use_deterministic_algorithms(True)
    try:
        metric.update(target, target)
    finally:
        torch.use_deterministic_algorithms(False)
    assert metric.scores().miou == 1.0


@pytest.mark.parametrize(("preds", "target"), [([0, 7], [0, 1]), ([0, 1], [0, 4])])
def test_classes_out_of_range_are_refused(preds, target):
    metric = SegmentationScores(2)
    with pytest.raises(ValueError, match=r"(predictions|target): found class [74], expected 0 to 1, or 255"):
        metric.update(torch.tensor(preds), torch.tensor(target))


def test_image_counts_with_an_ignore_index_outside_uint8():
    target = torch.tensor([[156, 156, 3]], dtype=torch.uint8)
    counts = image_counts(torch.tensor([[156, 0, 3]]), target, 171, ignore_index=-100)
    assert counts[:, [0, 3, 156]].tolist() == [[0, 1, 1], [0, 1, 2], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(1, 3\)"):
        image_counts(target.T, target, 171)
