"""Checkpoints of earlier versions: their arguments in today's terms, by Python and by the command."""

import torch

from mcseg.checkpoints.translate import translate
from mcseg.module import SegmentationModule
from mcseg.run.main import main

NEW = "mcseg.schedules.WarmupPolynomialLR"
STEP = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}}


def test_settings_of_the_polynomial_schedule_moved_to_a_class_of_its_own(caplog):
    old = {"num_classes": 3, "scheduler": None, "lr_power": 0.5, "warmup_steps": 7}
    with caplog.at_level("INFO"):
        found = translate(old)
    assert found == {"num_classes": 3, "scheduler": {"class_path": NEW, "init_args": {"power": 0.5, "warmup_steps": 7}}}
    assert "lr_power and warmup_steps are now settings of the scheduler" in caplog.text
    assert old == {"num_classes": 3, "scheduler": None, "lr_power": 0.5, "warmup_steps": 7}  # left as it was


def test_another_schedule_stays_and_loses_what_had_no_effect():
    assert translate({"scheduler": STEP, "lr_power": 0.5, "warmup_steps": 7}) == {"scheduler": STEP}


def test_arguments_of_this_version_stay_as_they_are(caplog):
    plain = dict(SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=3).hparams)
    with caplog.at_level("INFO"):
        assert translate(plain) == plain
    assert "earlier version" not in caplog.text
    assert plain["scheduler"] == {"class_path": NEW}


def old_checkpoint(path):
    objective = torch.nn.CrossEntropyLoss(ignore_index=255)
    module = SegmentationModule("unet", "tu-test_resnet.r160_in1k", num_classes=8, objective=objective)
    arguments = {**module.hparams, "scheduler": None, "lr_power": 0.5, "warmup_steps": 7}
    content = {"state_dict": module.state_dict(), "hyper_parameters": arguments, "pytorch-lightning_version": "2.6.6"}
    torch.save(content, path)
    return path


def test_an_old_checkpoint_loads_from_python(tmp_path):
    path = old_checkpoint(tmp_path / "old.ckpt")
    module = SegmentationModule.load_from_checkpoint(path)
    schedule = module.scheduler(torch.optim.SGD(module.parameters(), lr=0.1))
    assert (type(schedule).__name__, schedule.power, schedule.warmup_steps) == ("WarmupPolynomialLR", 0.5, 7)
    assert module.hparams["scheduler"]["init_args"] == {"power": 0.5, "warmup_steps": 7}
    assert not {"lr_power", "warmup_steps"} & set(module.hparams)
    # the caller's own goes before what was stored
    other = SegmentationModule.load_from_checkpoint(path, scheduler=torch.optim.lr_scheduler.ConstantLR)
    assert other.scheduler is torch.optim.lr_scheduler.ConstantLR


def test_an_old_checkpoint_loads_from_the_command(tmp_path, caplog):
    path = old_checkpoint(tmp_path / "old.ckpt")
    words = ["--data.num_workers=0", "--data.val_scenes=2", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    with caplog.at_level("INFO"):
        main(["validate", "--ckpt_path", str(path), *words, "--trainer.enable_progress_bar=false"])
    assert "lr_power and warmup_steps are now settings of the scheduler" in caplog.text
    assert "mIoU" in caplog.text
