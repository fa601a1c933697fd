"""Entry point of the command ``mcseg``; prints help and version without importing torch, which takes seconds."""

import sys
from collections.abc import Sequence

from mcseg.benchmarks import benchmark_names
from mcseg.run.recipes import recipe_names
from mcseg.version import __version__

_HELP = """usage: mcseg VERB [RECIPE] [--config NAME_OR_PATH ...] [--KEY VALUE ...]

  fit       train; writes checkpoints, metrics.csv, curves and panels into runs/<recipe>/<time>
            (--resume RUN_FOLDER resumes a run that was stopped)
  validate  score a checkpoint on the validation split       (--ckpt_path)
  test      score a checkpoint on the test split             (--ckpt_path)
  bound     lower bounds of mIoU for unseen images           (--ckpt_path, --split val --level 0.95)
  predict   masks and overlays for images                    (mcseg predict CKPT --images FILE, FOLDER or PATTERN)
            or a submission for a benchmark's server         (--ckpt_path, --format BENCHMARK)
  download  fetch a benchmark, or print how to get it        (mcseg download BENCHMARK --root DIR)
  compare   train objectives with several seeds and compare them: tables, intervals, a report
            (--objectives NAME ... --seeds 0 1 2; `mcseg compare --help` lists its options)
  show      contact sheet of images and labels               (--images 12 --split train)
  check     open every file of the data set and list all problems
  stats     pixel shares and margin offsets of the classes, as table and picture

recipes that come with mcseg: {recipes}
benchmarks: {benchmarks}
Arguments after a recipe override its keys: mcseg fit --config camvid --data.root DIR --trainer.max_epochs 10
--root is short for --data.root, --format for --writer.format, and a name after the verb for --config.
`mcseg VERB --help` lists the keys; MCSEG_TRACEBACK=1 prints the traceback of an error.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Arguments after ``mcseg``; None uses those of the process.

    Raises:
        SystemExit: 1 after an error, reported in one line; 2 if the arguments cannot be parsed; 143 after SIGTERM, 130 after
            Ctrl-C.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP.format(recipes=", ".join(recipe_names()), benchmarks=", ".join(benchmark_names())))
    elif words[0] == "--version":
        print(__version__)
    else:
        from mcseg.run.command import run  # imports torch and Lightning

        run(words)
