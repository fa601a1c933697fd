"""Several processes compute the same as one: losses, gradients, and a whole training with its scores."""

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.strategies import FSDPStrategy

from mcseg import SegmentationModule, SyntheticData
from mcseg.checkpoints.files import steps_done
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
    SumLoss,
    TverskyLoss,
    default_objective,
)

PIXELS = [9000, 700, 250, 50]
DICE = {"class_path": "mcseg.losses.DiceLoss"}
OBJECTIVES = {
    "cross entropy": CrossEntropyLoss,
    "weighted cross entropy": lambda: CrossEntropyLoss(4, weighting="median_frequency"),
    "label smoothing": lambda: CrossEntropyLoss(label_smoothing=0.1),
    "focal": lambda: FocalLoss(gamma=2.0),
    "LDAM": lambda: LDAMLoss(4),
    "logit adjustment": lambda: LogitAdjustmentLoss(4),
    "balanced softmax": lambda: BalancedSoftmaxLoss(4),
    "margin calibration": lambda: MarginCalibrationLoss(4),
    "running IoU": lambda: IoUWeightedLoss(4),
    "power Dice": default_objective,
    "generalised Dice": GeneralizedDiceLoss,
    "Tversky": lambda: TverskyLoss(gamma=1.5, classes="all"),
    "Dice": DiceLoss,
    "Jaccard per image": lambda: JaccardLoss(per_image=True),
    "Lovász per image": lambda: LovaszSoftmaxLoss(per_image=True),
    "sum": lambda: SumLoss(4, [DICE, {"class_path": "mcseg.losses.CrossEntropyLoss", "weight": 0.3}], 1, 2),
}


def objective(name):
    loss = OBJECTIVES[name]()
    return loss.calibrate(PIXELS) if hasattr(loss, "calibrate") else loss


def batch():
    """Return logits and targets of six images with all, half, a quarter, one, none and none of the pixels labelled."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6, 4, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(4, (6, 4, 5), generator=generator)
    target[1, :2] = target[2, :3] = target[4:] = 255
    target[3].view(-1)[1:] = 255
    return logits, target


def objectives_as_rank(rank, world, folder):
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    logits, target = batch()
    share = slice(rank * 6 // world, (rank + 1) * 6 // world)
    results = {}
    for name in OBJECTIVES:
        loss = objective(name)
        steps = []
        for _ in range(2):  # running averages act in the second step
            z = logits[share].clone().requires_grad_()
            value = loss(z, target[share])
            value.backward()
            steps.append([float(value.detach()), (z.grad / world).flatten().tolist()])  # as DDP averages gradients
        results[name] = steps
    if rank == 0:
        with torch.no_grad():  # on one process, where a collective would deadlock
            results["without gradient"] = {name: float(objective(name)(logits[:1], target[:1])) for name in OBJECTIVES}
    torch.distributed.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_losses_equal_those_of_one_process_with_all_pixels(world, tmp_path):
    torch.multiprocessing.spawn(objectives_as_rank, (world, str(tmp_path)), nprocs=world)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    logits, target = batch()
    for name in OBJECTIVES:
        loss = objective(name)
        for step in range(2):
            z = logits.clone().requires_grad_()
            value = loss(z, target)
            value.backward()
            values, gradients = zip(*(results[name][step] for results in found), strict=True)
            assert sum(values) / world == pytest.approx(float(value.detach()), rel=1e-6), name
            gradient = torch.cat([torch.tensor(part, dtype=torch.float64) for part in gradients])
            torch.testing.assert_close(gradient, z.grad.flatten(), rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in found[0]["without gradient"].items():
        assert value == pytest.approx(float(objective(name)(logits[:1], target[:1])), rel=1e-12), name


TRAIN = """
import json, sys, warnings
from functools import partial
import pytorch_lightning as pl
import torch
from mcseg import JaccardCallback, SegmentationModule, SyntheticData
from mcseg.losses import IoUWeightedLoss

warnings.filterwarnings("ignore")
processes, folder = int(sys.argv[1]), sys.argv[2]
pl.seed_everything(0)
# no random crop, flip or colour: the images of a step are the same in whatever process
data = SyntheticData(
    train_scenes=12, val_scenes=7, size=(64, 96), total_batch_size=6, num_workers=0, crop_size=(64, 96), scale_range=(1, 1),
    flip=False, color_jitter=0.0,
)
module = SegmentationModule(
    "unet", "tu-test_resnet.r160_in1k", num_classes=data.num_classes, network_options={"decoder_channels": [8] * 5}, frozen_batch_norm=True,
    objective=IoUWeightedLoss(data.num_classes),
    optimizer=partial(torch.optim.SGD, lr=1e-3),
)
start = torch.cat([p.detach().double().flatten() for p in module.network.parameters()])
scores = JaccardCallback()
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", devices=processes, strategy="ddp", callbacks=[scores],
    default_root_dir=folder, logger=pl.loggers.CSVLogger(folder, "", ""), enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, precision="32-true",
)
trainer.fit(module, data)
weights = torch.cat([p.detach().double().flatten() for p in module.network.parameters()])
everywhere = [torch.empty_like(weights) for _ in range(processes)]
torch.distributed.all_gather(everywhere, weights)
counts = scores.scores["val"].confusion
if trainer.is_global_zero:
    torch.save({"start": start, "weights": everywhere, "confusion": counts, "shares": module.objective.running_shares}, folder + "/found.pt")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function from the number of processes to the results of a training and its logged rows."""
    results = {}

    def run(processes):
        if processes not in results:
            folder = tmp_path_factory.mktemp(f"processes{processes}")
            script = folder / "train.py"
            script.write_text(TRAIN)
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            words = [sys.executable, str(script), str(processes), str(folder)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
            results[processes] = (
                torch.load(folder / "found.pt", weights_only=True),
                list(csv.DictReader((folder / "metrics.csv").read_text().splitlines())),
            )
        return results[processes]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_training_equals_that_of_one_process(trained, processes):
    (single, single_log), (together, log) = trained(1), trained(processes)
    first, *others = together["weights"]
    assert len(others) == processes - 1
    assert all(torch.equal(first, weights) for weights in others)
    assert torch.equal(together["start"], single["start"])
    moved = (single["weights"][0] - single["start"]).abs()
    assert float((first - single["weights"][0]).abs().max()) < 1e-4 * float(moved.max())
    # Seven images on two or three processes: repeated images must not count
    assert torch.equal(together["confusion"], single["confusion"])
    data = SyntheticData(val_scenes=7, size=(64, 96), num_workers=0)
    labelled = sum(int((data.reader.mask(sample) != 255).sum()) for sample in data.samples("val"))
    assert int(single["confusion"].sum()) == labelled
    torch.testing.assert_close(together["shares"], single["shares"], rtol=1e-5, atol=1e-9)
    assert len(log) == len(single_log)  # only rank 0 writes, and it writes the values of all processes
    for row, single_row in zip(log, single_log, strict=True):
        for name, value in row.items():
            assert (float(value or 0), name) == (pytest.approx(float(single_row[name] or 0), rel=1e-4, abs=1e-7), name)


def sharded_as_rank(rank, world, folder):
    """Compute loss and gradients with sharded weights, and with a whole copy on all images."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/shards", rank=rank, world_size=world)
    torch.manual_seed(0)
    module = SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=4, frozen_batch_norm=True)
    module.objective.smooth = 0.0  # the counts of the whole copy are summed over both processes as well
    whole_copy = copy.deepcopy(module)
    module._trainer = SimpleNamespace(strategy=FSDPStrategy())  # Lightning's Trainer accepts this strategy only with a GPU
    module.setup("validate")
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(module.network.model.encoder, mesh=mesh)
    fully_shard(module.network, mesh=mesh)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (world, 3, 32, 32), dtype=torch.uint8, generator=generator)
    target = torch.randint(0, 4, (world, 32, 32), generator=generator)
    found = []
    for copied, images in ((module, slice(rank, rank + 1)), (whole_copy, slice(None))):
        loss = copied.objective(copied(image[images]), target[images])
        loss.backward()
        gradients = {name: p.grad for name, p in copied.network.named_parameters() if p.grad is not None}
        whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in gradients.items()}
        found.append((loss.detach(), {name: grad.contiguous() for name, grad in whole.items()}))
    if rank == 0:
        torch.save(found, folder + "/found.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_weights_train_like_whole_ones(tmp_path):
    torch.multiprocessing.spawn(sharded_as_rank, (2, str(tmp_path)), nprocs=2)
    (loss, gradients), (expected, whole) = torch.load(tmp_path / "found.pt", weights_only=True)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert gradients.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


DYING = """
import os, signal, sys
import pytorch_lightning as pl
from mcseg.run.main import main

class Dies(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 1:
            if sys.argv[1] in ("SIGKILL", "SIGTERM"):
                os.kill(os.getpid(), signal.Signals[sys.argv[1]])
            else:
                raise ValueError("the disk is on fire")

make = pl.Trainer.__init__
def init(self, *args, callbacks=None, **options):
    make(self, *args, callbacks=[*(callbacks or []), Dies()], **options)
pl.Trainer.__init__ = init
main(["fit", "synthetic", *sys.argv[2:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("SIGKILL", 1, "error: another process of this run died"),
        ("raised", 1, "the disk is on fire"),
        ("SIGTERM", 128 + 15, "stopped by a signal; resume with: mcseg fit --resume"),
    ],
)
def test_a_process_that_dies_ends_the_job_with_its_reason(how, code, reason, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DYING)
    words = [
        "--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--data.train_scenes=64",
        "--data.size=[32,48]", "--data.crop_size=[32,32]", "--data.num_workers=0", "--trainer.enable_progress_bar=false",
        "--model.encoder=tu-test_resnet.r160_in1k", "--data.batch_size=2", f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), how, *words]
    # The time limit includes the start of both processes.
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == code
    assert reason in done.stdout + done.stderr
    if how == "SIGTERM":  # received by the second process only
        assert steps_done(tmp_path / "run" / "checkpoints" / "last.ckpt") == 2


@pytest.mark.slow
def test_evaluation_does_not_deadlock_if_a_process_has_no_image(photo_folder, tmp_path):
    """Three images on two processes: the second has an unreadable image and a repetition of the first."""
    (photo_folder / "train.txt").write_text("".join(f"photo {index}\n" for index in range(3, 10)))
    (photo_folder / "val.txt").write_text("photo 0\nphoto 1\nphoto 2\n")
    words = [f"--data.root={photo_folder}", "--data.num_workers=0", "--trainer.accelerator=cpu", "--data.on_error=skip"]
    words += ["--model.encoder=tu-test_resnet.r160_in1k"]
    fit = ["--data.batch_size=2", "--trainer.max_epochs=1", "--model.encoder_weights=null"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    found = []

    def mcseg(command, folder, *more):
        line = [sys.executable, "-m", "mcseg", command, "folder", *words, f"--trainer.default_root_dir={folder}", *more]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]

    mcseg("fit", tmp_path / "run", *fit)
    (photo_folder / "images" / "photo 1.jpg").write_bytes(b"")
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        mcseg("validate", folder, f"--ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}", f"--trainer.devices={processes}")
        found.append(next(csv.DictReader((folder / "metrics.csv").read_text().splitlines())))
    single, together = found
    assert float(single["val/loss"]) > 0
    assert single.keys() == together.keys()
    for name, value in together.items():
        assert (name, float(value)) == (name, pytest.approx(float(single[name]), rel=1e-6))


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_appends_to_its_log(tmp_path):
    """Only rank 0 copies the existing rows; otherwise rows are lost."""
    folder = tmp_path / "run"
    words = [
        "--data.train_scenes=8", "--data.val_scenes=3", "--data.size=[32,48]", "--data.crop_size=[32,32]", "--data.batch_size=2",
        "--data.num_workers=0", "--model.encoder=tu-test_resnet.r160_in1k", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={folder}",
    ]  # fmt: skip
    found = []
    for start in (["synthetic", *words, "--trainer.max_epochs=1"], ["--resume", str(folder), "--trainer.max_epochs=2"]):
        line = [sys.executable, "-m", "mcseg", "fit", *start]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        found.append([{key: value for key, value in row.items() if value} for row in rows])
    before, after = found
    assert after[: len(before)] == before
    assert {row["step"] for row in before} == {"0", "1"}
    assert {row["step"] for row in after[len(before) :]} == {"2", "3"}


@pytest.mark.slow
def test_two_processes_train_the_packaged_recipe_and_count_all_predictions(tmp_path):
    """The recipe uses three quarters of its encoder; parameters that no loss reaches stop a training of several processes."""
    words = ["--data.crop_size=[64,64]", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    fit = ["--data.train_scenes=8", "--data.val_scenes=2", "--data.batch_size=2", "--trainer.max_epochs=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def mcseg(command, *more):
        line = [sys.executable, "-m", "mcseg", command, "synthetic", *words, *more]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    mcseg("fit", *fit, f"--trainer.default_root_dir={tmp_path / 'run'}")
    said = mcseg(
        "predict", "--data.test_scenes=5", f"--ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}",
        f"--trainer.default_root_dir={tmp_path / 'predicted'}",
    )  # fmt: skip
    assert len(list((tmp_path / "predicted" / "masks").rglob("*.png"))) == 5
    assert said.count("5 predictions written to") == 1
