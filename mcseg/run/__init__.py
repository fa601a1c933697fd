"""The command ``mcseg``, and the trip of a run from ``mcseg fit`` to the end of a resumed run.

``mcseg fit camvid --root DATA``:

1.  ``main.py`` answers ``--help`` and ``--version`` itself; for all else it imports torch and calls ``command.run``.
2.  ``command.py`` expands the words: ``resume.py`` spells out ``--resume``, ``recipes.py`` the shorthand (``--root`` is
    ``--data.root``) and the recipe's name, which becomes ``--config configs/camvid.yaml``. It chooses the verb: those of
    Lightning run in ``cli.SegmentationCLI``, the others in ``verbs.py``. Whatever fails below comes back here, and is
    reported in one line by ``messages.py``.
3.  ``cli.py`` is a LightningCLI: it parses recipe, command line and ``--ckpt_path`` into one configuration, and refuses what
    cannot be. ``folder.run_folder`` creates ``runs/camvid/<time>``; precision, loggers and checkpoints are pointed at it.
4.  ``cli.py`` makes the data module, the module, and the Trainer with mcseg's callbacks: among them
    ``signals.CheckpointOnSignal``, and two of Lightning's that write ``checkpoints/best.ckpt`` when ``val/miou`` rises and
    ``checkpoints/last.ckpt`` after each epoch, through ``checkpoints/files.CheckpointFile``.
5.  ``folder.exclusive_lock`` keeps a second process out of the folder while ``Trainer.fit`` runs. In it ``config.yaml`` is
    written, ``module.on_fit_start`` calibrates the objective and loads the weights to start from; then come the epochs.
6.  At the end ``command.py`` removes the folder if the run left nothing but its settings (``folder.run_folder_tidied``).

A run is stopped by SIGTERM or Ctrl-C:

7.  ``signals.py`` notes the signal. After the next optimiser step, the same one in all processes, it asks Lightning to stop,
    writes ``checkpoints/last.ckpt`` and says how to resume; the exit code is 143 or 130. A run that is killed has the
    ``last.ckpt`` of its last epoch.

``mcseg fit --resume runs/camvid/<time>``:

8.  ``resume.expand_resume`` turns it into ``fit --config <folder>/config.yaml --trainer.default_root_dir <folder>
    --ckpt_path <folder>/checkpoints/last.ckpt``, without the last if there is none yet. Steps 2 to 6 follow, with these
    differences.
9.  ``cli.py`` leaves ``config.yaml`` as it is, and makes each logger append: ``resume.ContinuedCSVLogger`` drops the rows
    after the checkpoint's step, TensorBoard purges them, W&B continues the run of the same id.
10. The Trainer restores weights, optimiser, schedule and loops. ``module.on_load_checkpoint`` has compared classes and
    network before (``checkpoints/compatibility.py``), so ``on_fit_start`` neither calibrates nor loads anything.
11. ``data/order.TrainingOrder`` starts after the batches that are done, and the seeds of crops and dropout follow from epoch
    and batch (``seeds.py``): the weights become those of a run that was never stopped.
"""
