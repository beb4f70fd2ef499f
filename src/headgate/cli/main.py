"""The ``headgate`` command: one verb a file, errors without a traceback, exit codes that scripts can read.

Exit codes: 0 done; 1 something failed; 2 a recipe or an argument is wrong; 130 interrupted (state saved).
A verb's file is imported when that verb is called: help, a version and a typo need neither torch nor transformers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import typer

import headgate
from headgate.cli.quiet import quiet_libraries
from headgate.errors import ConfigError, DataError, EndedElsewhere, HeadgateError, ModelError, Stopped

VERBS: dict[str, tuple[str, str]] = {
    "demo": (
        "demo:demo",
        "Each method at what it is for, beside its honest baseline: four small comparisons, one page.",
    ),
    "train": (
        "train:train",
        "Train, evaluate, and write a run directory. A partial run resumes where it stopped.",
    ),
    "compare": ("compare:compare", "Run every arm at every seed and say what the difference is."),
    "sweep": ("sweep:sweep", "Run every combination of the recipe's sweep: section."),
    "eval": (
        "evaluate:evaluate",
        "Measure a run, a saved checkpoint or a bare model; per-item predictions are written.",
    ),
    "generate": ("generate:generate", "Continue prompts, with routing live or removed."),
    "export": (
        "export:export",
        "Write a run for other programs: with its routing, merged, pruned, as adapters.",
    ),
    "push": ("push:push", "Publish an export on the Hugging Face hub; --dry-run shows what would go."),
    "verify": (
        "verify:verify",
        "Load what was saved, measure it again, and say what differs from what is reported.",
    ),
    "inspect": ("inspect:inspect", "What routers, schemas, experts and gates learned."),
    "report": (
        "report:report",
        "One self-contained page of a comparison, a sweep, a run or a folder of runs.",
    ),
    "runs": ("runs:runs", "List run directories; --csv exports all their figures."),
    "diff": ("runs:diff", "What differs between two runs: recipe, environment, results."),
    "cite": ("runs:cite", "BibTeX of what a run used."),
    "bench": ("bench:bench", "Speed and memory against named peers, one JSON line last."),
    "init": ("recipes:init", "Write a commented recipe for a data file of one's own."),
    "recipes": ("recipes:recipes", "The recipes that come with the package."),
    "validate": ("validate:validate", "Check a recipe without loading a model, and print what it would do."),
    "probe": ("probe:probe", "Can gating pay on this model and this data, and in which form?"),
    "data": ("data:data", "Rows as they are trained."),
    "sources": ("sources:sources", "What data can be read, by name."),
    "equations": (
        "equations:equations",
        "Each equation of a method, its function and the tests that prove it.",
    ),
    "schema": ("info:schema", "JSON Schema of a recipe."),
    "env": ("info:env", "Versions and hardware, to paste into an issue."),
}
"""Verb -> ``file:function`` below ``headgate.cli``, and its line of the help."""
LIGHT = frozenset({"runs", "recipes", "diff", "report", "schema", "sources", "validate", "equations"})
"""Verbs that train and generate nothing."""
RECIPE_FIRST = frozenset({"train", "compare", "sweep", "probe", "data"})
"""Verbs that read a recipe before they import torch and transformers, whose talk they then turn down themselves."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"headgate {headgate.__version__}")
        raise typer.Exit


def _top(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Routed and gated fine-tuning of language models, with the evidence."""


def command_line(verb: str | None) -> typer.Typer:
    """The program with ``verb``'s own command, and the others as a line of help each."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, callback=_top)
    for name, (place, line) in VERBS.items():
        if name == verb:
            module, function = place.split(":")
            app.command(name)(_heard(getattr(importlib.import_module(f"headgate.cli.{module}"), function)))
        else:
            app.command(name, help=line)(_another)
    return app


class Interrupted(Exception):
    """Ctrl-C inside a verb; ``told``: the run has said so itself, and what it saved."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = told


def _heard(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, whose Ctrl-C reaches ``main``: on a KeyboardInterrupt typer ends the program without a word."""

    @functools.wraps(verb)
    def run(*arguments: object, **options: object) -> None:
        try:
            verb(*arguments, **options)
        except KeyboardInterrupt as stop:
            raise Interrupted(isinstance(stop, Stopped)) from None

    return run


def _another() -> None:
    """A verb that was not asked for; ``command_line`` was built for another one."""
    raise AssertionError("the verb of the command line is imported before it runs")


def keep_freed_memory() -> None:
    """glibc gives large freed blocks back to the kernel and faults them in again at every step; keep them.

    A fifth of the step time of a small model on a CPU. Elsewhere (musl, macOS, Windows) there is no mallopt.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, 256 << 20)
    mallopt(mmap_threshold, 32 << 20)


def refuse_ranks(arguments: Sequence[str]) -> None:
    """Raise ConfigError under torchrun for verbs that would do everything once a rank and write over each other."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and "RANK" in os.environ and arguments and arguments[0] != "train":
        raise ConfigError(
            f"headgate {arguments[0]} runs in one process, not on {ranks} ranks: start it without torchrun"
        )


def main() -> None:
    """Entry point of the console script."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    verb = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)  # advice to the libraries' own authors
    ranks = _ranks()
    try:
        if ranks is not None:
            refuse_ranks(sys.argv[1:])
        if verb in VERBS and verb not in LIGHT and "--help" not in sys.argv:
            keep_freed_memory()
            if verb not in RECIPE_FIRST:
                quiet_libraries()
        command_line(verb)(standalone_mode=True)
    except (KeyboardInterrupt, Interrupted) as stop:
        told = isinstance(stop, Interrupted) and stop.told
        if not told and (ranks is None or ranks.is_writer()):
            print("interrupted", file=sys.stderr)
        _part(ranks)
        sys.exit(130)
    except EndedElsewhere as error:
        if ranks is not None:
            ranks.await_last_word()
        sys.exit(error.code)
    except HeadgateError as error:
        if debug:
            raise
        if (
            ranks is None or ranks.is_writer() or ranks.world_size() > 1
        ):  # before they meet, all ranks fail alike
            print(f"error: {error}", file=sys.stderr, flush=True)
        if ranks is not None:
            ranks.say_last_word()
        sys.exit(2 if isinstance(error, (ConfigError, DataError, ModelError)) else 1)
    except OSError as error:
        if debug:
            raise
        print(
            f"error: {error.strerror or error}: {error.filename or ''} (--debug shows where)", file=sys.stderr
        )
        if ranks is not None:
            ranks.say_last_word()
        sys.exit(1)
    except Exception:
        if ranks is None:
            raise
        traceback.print_exc()  # now, not when the interpreter ends: the other ranks wait for the last word
        ranks.say_last_word()
        sys.exit(1)
    finally:
        if ranks is not None:
            ranks.leave()


def _ranks() -> ModuleType | None:
    """How the processes of one run end together; None in a process alone, which then need not import torch for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from headgate.training import processes

    return processes


def _part(ranks: ModuleType | None) -> None:
    """The writer speaks last; the others wait for it."""
    if ranks is not None:
        (ranks.say_last_word if ranks.is_writer() else ranks.await_last_word)()


if __name__ == "__main__":
    main()
