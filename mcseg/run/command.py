"""Run one verb of the command ``mcseg`` and report errors in one line."""

import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mcseg.messages import one_line
from mcseg.run.cli import SegmentationCLI, silence_warnings
from mcseg.run.folder import RUN_FOLDER, run_folder_tidied
from mcseg.run.recipes import expand_shorthand, find_recipes
from mcseg.run.resume import expand_resume
from mcseg.run.verbs import bound, check, compare, download, show, stats


def run(words: Sequence[str]) -> None:
    """Run a verb.

    Args:
        words: Verb and arguments.

    Raises:
        SystemExit: As for `mcseg.run.main.main`.
    """
    words = list(words)
    if os.getcwd() not in sys.path:  # the installed script, unlike `python -m mcseg`, does not search the current folder
        sys.path.append(os.getcwd())
    if isinstance(sys.__stdout__, io.TextIOWrapper):  # sys.stdout may be a library's wrapper around it
        sys.__stdout__.reconfigure(errors="backslashreplace")  # for class names that the terminal cannot encode
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop(RUN_FOLDER, None)
    try:
        if words[0] == "download":
            download(words[1:])
            return
        words, resume = expand_resume(words)
        own = {"stats": stats, "check": check, "show": show, "bound": bound, "compare": compare}
        verbs = [*SegmentationCLI.subcommands(), *own, "download"]
        if words[0].startswith("-"):
            raise ArgumentError(
                None, f"found the option {words[0]}, expected a verb first: {', '.join(verbs)}; see mcseg --help"
            )
        if words[0] not in verbs:
            raise ValueError(f"found the verb {words[0]!r}, expected one of {', '.join(verbs)}; see mcseg --help")
        recipe, words = find_recipes(expand_shorthand(words))
        with warnings.catch_warnings(), run_folder_tidied():
            silence_warnings()
            if words[0] in own:
                own[words[0]](recipe, words[1:])
            else:
                SegmentationCLI(recipe, words, resume=resume)
    except KeyboardInterrupt:
        _fail("stopped by Ctrl-C", 128 + signal.SIGINT)
    except SIGTERMException as error:  # CheckpointOnSignal sets the code, but only in training
        sys.exit(error.code or 128 + signal.SIGTERM)
    except ArgumentError as error:
        _fail(one_line(error), 2)
    except (ValueError, OSError, RuntimeError, MisconfigurationException) as error:
        if os.environ.get("MCSEG_TRACEBACK"):
            raise
        _fail(one_line(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"mcseg: error: {message}", file=sys.stderr)
    sys.exit(code)  # W&B patches sys.exit to record the code of a failed run, so SystemExit must not be raised directly
