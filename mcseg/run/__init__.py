"""The command ``mcseg``, and the path of a run from ``mcseg fit`` to the end of a resumed run.

A run starts with ``mcseg fit camvid --root DATA``:

1.  ``main.py`` answers ``--help`` and ``--version``. For everything else it imports torch and calls ``command.run``.
2.  ``command.py`` expands the arguments: ``resume.py`` replaces ``--resume``, ``recipes.py`` replaces short forms
    (``--root`` by ``--data.root``) and recipe names (``camvid`` by ``--config configs/camvid.yaml``). Then it runs the verb:
    Lightning's verbs in ``cli.SegmentationCLI``, the other verbs in ``verbs.py``. It catches the errors of all later steps
    and prints each as one line (``mcseg/messages.py``).
3.  ``cli.py`` is a LightningCLI. It parses recipe, arguments and ``--ckpt_path`` into one configuration, and raises an
    error if settings contradict each other. ``folder.run_folder`` creates ``runs/camvid/<time>``, into which loggers and
    checkpoints write.
4.  ``cli.py`` creates the data module, the module, and the Trainer with mcseg's callbacks: ``signals.CheckpointOnSignal``,
    ``LastValidation``, and two ModelCheckpoints, which write ``checkpoints/best.ckpt`` when ``val/miou`` rises and
    ``checkpoints/last.ckpt`` after each epoch. Both write through ``checkpoints/files.CheckpointFile``, which replaces a
    file only when the new one is complete.
5.  ``Trainer.fit`` runs while ``folder.exclusive_lock`` keeps other processes out of the folder. Lightning writes
    ``config.yaml``, ``module.on_fit_start`` loads pretrained weights and calibrates the objective, and the epochs follow.
6.  At the end ``folder.run_folder_tidied`` removes a folder without results, for example after a wrong setting.

A signal, SIGTERM or Ctrl-C, stops the run:

7.  ``signals.py`` notes the signal. After the next optimiser step, the same step in all processes, it stops the Trainer,
    writes ``checkpoints/last.ckpt`` and prints the command to resume. The exit code is 143 or 130. After SIGKILL or a crash,
    the ``last.ckpt`` of the last complete epoch remains.

``mcseg fit --resume runs/camvid/<time>`` resumes the run. Steps 2 to 6 repeat with these differences:

8.  ``resume.expand_resume`` replaces ``--resume`` by ``--config <folder>/config.yaml --trainer.default_root_dir <folder>
    --ckpt_path <folder>/checkpoints/last.ckpt``, without ``--ckpt_path`` if there is no checkpoint yet.
    ``checkpoints/translate.py`` translates settings of an earlier version.
9.  ``cli.py`` refuses changes of the module's settings and writes other changes into ``config.yaml``.
    ``resume.resume_logger`` makes each logger append: the CSV and TensorBoard loggers drop rows after the checkpoint's step;
    W&B continues the run with the same id.
10. ``checkpoints/module.py`` raises an error if the checkpoint has another network or number of classes. Then the Trainer
    restores weights, optimiser, schedule and loops, and ``module.on_fit_start`` neither calibrates nor loads weights.
11. ``data/batches.TrainingOrder`` skips the batches that are done. The seeds of crops and dropout depend only on the run's
    seed, the epoch and the batch (``mcseg/seeds.py``). The final weights equal those of an uninterrupted run.
"""
