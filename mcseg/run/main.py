"""The command ``mcseg``: Lightning's fit, validate, test and predict, and mcseg's own verbs for data sets."""

import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mcseg.data.benchmark import benchmark_names
from mcseg.messages import one_line
from mcseg.run.cli import SegmentationCLI, silence_warnings
from mcseg.run.folder import RUN_FOLDER, run_folder_tidied
from mcseg.run.recipes import expand_shorthand, find_recipes, recipe_names
from mcseg.run.resume import expand_resume
from mcseg.run.verbs import bound, check, compare, download, show, stats

_HELP = """usage: mcseg VERB [RECIPE] [--config NAME_OR_PATH ...] [--KEY VALUE ...]

  fit       train; writes checkpoints, metrics.csv, curves and panels into runs/<recipe>/<time>
            (--resume RUN_FOLDER goes on with a run that was stopped)
  validate  score a checkpoint on the validation split       (--ckpt_path)
  test      score a checkpoint on the test split             (--ckpt_path)
  bound     what a held-out split promises for unseen images (--ckpt_path, --split val --level 0.95)
  predict   masks and overlays for a folder of images        (--ckpt_path, --data.predict_root)
            or what a benchmark's server takes               (--ckpt_path, --format BENCHMARK)
  download  fetch a benchmark, or say how to get it          (mcseg download BENCHMARK --root DIR)
  compare   train objectives with several seeds and compare them: tables, intervals, a report
            (--objectives NAME ... --seeds 0 1 2; `mcseg compare --help` lists its options)
  show      contact sheet of images and labels               (--images 12 --split train)
  check     open every file of the data set and list what is wrong with it
  stats     pixel shares and margin offsets of the classes, as table and picture

recipes that come with mcseg: {recipes}
benchmarks: {benchmarks}
Any key of a recipe can be set behind it: mcseg fit --config camvid --data.root DIR --trainer.max_epochs 10
--root is short for --data.root, --format for --writer.format, and a name behind the verb for --config.
`mcseg VERB --help` lists the keys; MCSEG_TRACEBACK=1 shows where an error came from.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; ``args`` are those behind ``mcseg``, by default the process's own.

    Raises:
        SystemExit: 1 after an error, told in one line; 2 where the arguments cannot be read; 143 after SIGTERM, 130 after
            Ctrl-C.
    """
    words = list(sys.argv[1:] if args is None else args)
    if isinstance(sys.__stdout__, io.TextIOWrapper):  # which a library may have wrapped in a stream of its own
        sys.__stdout__.reconfigure(errors="backslashreplace")  # as stderr does: not every class name has letters it knows
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop(RUN_FOLDER, None)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP.format(recipes=", ".join(recipe_names()), benchmarks=", ".join(benchmark_names())))
        return
    if words[0] == "--version":
        from mcseg.version import __version__

        print(__version__)
        return
    try:
        if words[0] == "download":
            download(words[1:])
            return
        words, resume = expand_resume(words)
        recipe, words = find_recipes(expand_shorthand(words))
        own = {"stats": stats, "check": check, "show": show, "bound": bound, "compare": compare}
        if words[0] not in (verbs := [*SegmentationCLI.subcommands(), *own, "download"]):
            raise ValueError(f"found the verb {words[0]!r}, expected one of {', '.join(verbs)}; see mcseg --help")
        with warnings.catch_warnings(), run_folder_tidied():
            silence_warnings()
            if words[0] in own:
                own[words[0]](recipe, words[1:])
            else:
                SegmentationCLI(recipe, words, resume=resume)
    except KeyboardInterrupt:
        _fail("ended by Ctrl-C", 128 + signal.SIGINT)
    except SIGTERMException as end:  # without a code unless a training had to end, as if all had been done
        sys.exit(end.code or 128 + signal.SIGTERM)
    except ArgumentError as error:
        _fail(one_line(error), 2)
    except (ValueError, OSError, RuntimeError, MisconfigurationException) as error:
        if os.environ.get("MCSEG_TRACEBACK"):
            raise
        _fail(one_line(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"mcseg: error: {message}", file=sys.stderr)
    sys.exit(code)  # not raised by hand: W&B notes the code of a failed run in this function
