"""IoUWeightedLoss: the weights are the gradient of mIoU, and the loss equals its formula."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from mcseg.losses import IoUWeightedLoss
from mcseg.losses.iou_weights import confusion_shares, iou_weights
from mcseg.margins import margin_offsets

PIXELS = [9000, 700, 250, 50]


def case(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, 5, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 5, 7), generator=generator)
    target[0, 0] = 255
    return logits.to(dtype), target


def make(**options):
    return IoUWeightedLoss(4, **options).calibrate(PIXELS)


def test_the_loss_against_a_loop():
    """Compute shares, weights and errors in plain Python for the first training step; `decay` cancels there."""
    logits, target = case()
    pixels = [
        (logits[n, :, y, x].tolist(), int(target[n, y, x]))
        for n, y, x in itertools.product(range(2), range(5), range(7))
        if target[n, y, x] != 255
    ]
    share, hits, predicted = [0.0] * 4, [0.0] * 4, [0.0] * 4
    for z, label in pixels:
        best = z.index(max(z))
        share[label] += 1 / len(pixels)
        predicted[best] += 1 / len(pixels)
        hits[label] += (best == label) / len(pixels)
    union = [share[k] + predicted[k] - hits[k] for k in range(4)]
    scale = sum(share[k] / union[k] for k in range(4))
    misses = [1 / union[k] / scale for k in range(4)]
    alarms = [misses[k] * max(hits[k] / union[k], 0.1) for k in range(4)]
    foreground, background = (offsets.tolist() for offsets in margin_offsets(PIXELS, "miou", max_margin=2.0))
    total = 0.0
    for z, label in pixels:
        for k in range(4):
            s = z[k] - max(z[j] for j in range(4) if j != k)
            t, weight = (foreground[k] - s, misses[k]) if k == label else (background[k] + s, alarms[k])
            total += weight * math.log1p(math.exp(t))
    loss = make(max_margin=2.0)
    assert float(loss(logits, target)) == pytest.approx(total / len(pixels), rel=1e-12)
    assert loss.class_statistics["miss_weight"].tolist() == pytest.approx(misses, rel=1e-12)
    assert loss.class_statistics["false_alarm_weight"].tolist() == pytest.approx(alarms, rel=1e-12)
    assert loss.class_statistics["running_iou"].tolist() == pytest.approx([hits[k] / union[k] for k in range(4)])


def test_weights_are_the_gradient_of_miou():
    """Differentiate mIoU as a function of misses a and false alarms b by autograd."""
    torch.manual_seed(0)
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    a = (p * 0.3).requires_grad_()
    b = torch.tensor([0.05, 0.02, 0.04, 0.01], dtype=torch.float64).requires_grad_()
    ((p - a) / (p + b)).mean().backward()
    hits = (p - a).detach()
    misses, false_alarms = iou_weights(torch.stack([p, hits, hits + b.detach()]), floor=0.0)
    scale = misses[0] / -a.grad[0]
    assert torch.allclose(misses, -scale * a.grad, rtol=1e-12)
    assert torch.allclose(false_alarms, -scale * b.grad, rtol=1e-12)
    assert float((misses * p).sum()) == pytest.approx(1, abs=1e-12)


def test_weights_of_classes_without_labels_and_the_floor():
    shares = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.0, 0.0], [0.9, 0.05, 0.05]], dtype=torch.float64)
    misses, false_alarms = iou_weights(shares)
    assert float(misses[2]) == float(false_alarms[2]) == 0
    assert float(false_alarms[1] / misses[1]) == pytest.approx(0.1)  # IoU 0, clamped
    assert float(false_alarms[0] / misses[0]) == pytest.approx(1)


def test_confusion_shares_against_scikit_learn():
    logits, target = case()
    kept = target != 255
    counts = confusion_matrix(target[kept], logits.argmax(1)[kept], labels=range(4))
    expected = np.stack([counts.sum(1), counts.diagonal(), counts.sum(0)]) / counts.sum()
    assert np.allclose(confusion_shares(logits, target, 255).numpy(), expected, atol=1e-15)


def test_running_shares_change_in_training_only_and_are_in_the_state_dict():
    loss = make(decay=0.75)
    first, second = case(0), case(1)
    loss(*first)
    loss(*second)
    a, b = confusion_shares(*first, 255), confusion_shares(*second, 255)
    assert torch.allclose(loss.running_shares, 0.25 * (0.75 * a + b))
    loss.eval()(*first)
    assert torch.allclose(loss.running_shares, 0.25 * (0.75 * a + b))
    loss.train()(first[0], torch.full_like(first[1], 255))  # without labels only the scale changes
    copy = IoUWeightedLoss(4)
    copy.load_state_dict(loss.state_dict())
    assert torch.equal(copy.eval()(*first), loss.eval()(*first))
    assert loss.half().running_shares.dtype == torch.float64


def test_contract():
    """Check that void has no effect, that all void gives 0, and that gradients are correct and finite in half precision."""
    logits, target = case()
    loss = make()
    loss(logits, target)
    loss.eval()
    z = logits.clone().requires_grad_()
    value = loss(z, target)
    value.backward()
    assert not z.grad[0, :, 0].any()
    changed = logits.clone()
    changed[0, :, 0] = torch.nan
    assert float(loss(changed, target)) == float(value.detach())
    index, step = (1, 2, 3, 4), 1e-6
    up, down = logits.clone(), logits.clone()
    up[index] += step
    down[index] -= step
    slope = float((loss(up, target) - loss(down, target)) / (2 * step))
    assert float(z.grad[index]) == pytest.approx(slope, rel=1e-4, abs=1e-9)
    z = logits.clone().requires_grad_()
    value = loss(z, torch.full_like(target, 255))
    value.backward()
    assert float(value.detach()) == 0
    assert not z.grad.any()
    for dtype in (torch.float16, torch.bfloat16):
        z = (1e4 * logits.sign()).to(dtype).requires_grad_()
        value = loss(z, target)
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert z.grad.isfinite().all()


def run_as_rank(rank, folder):
    """Run one of two processes with half of the batch: loss, gradient as averaged by DDP, running shares."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    logits, target = case()
    z = logits[rank : rank + 1].clone().requires_grad_()
    loss = make()
    value = loss(z, target[rank : rank + 1])
    value.backward()
    results = [float(value.detach()), (z.grad / 2).flatten().tolist(), loss.running_shares.tolist()]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_loss_of_one(tmp_path):
    torch.multiprocessing.spawn(run_as_rank, (str(tmp_path),), nprocs=2)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    logits, target = case()
    z = logits.clone().requires_grad_()
    loss = make()
    value = loss(z, target)
    value.backward()
    assert sum(loss for loss, _, _ in results) / 2 == pytest.approx(float(value.detach()), rel=1e-12)
    for rank, (_, gradient, shares) in enumerate(results):
        assert np.allclose(gradient, z.grad[rank].flatten(), atol=1e-15)
        assert np.allclose(shares, loss.running_shares.numpy(), atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay: found 1.0, expected 0 <= decay < 1"),
        ({"max_margin": 0.0}, "max_margin: found 0.0"),
        ({"num_classes": 1}, "num_classes: found 1"),
        ({"backend": "fast"}, "backend: found 'fast'"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IoUWeightedLoss(**{"num_classes": 4, **options})
    with pytest.raises(RuntimeError, match="IoUWeightedLoss is not calibrated"):
        IoUWeightedLoss(4)(*case())
