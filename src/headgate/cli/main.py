"""The ``headgate`` command: one verb a file, errors without a traceback, exit codes that scripts can read.

Exit codes: 0 done; 1 something failed; 2 a recipe or an argument is wrong; 130 interrupted (state saved).
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from headgate.cli.bench import bench
from headgate.cli.compare import compare
from headgate.cli.data import data
from headgate.cli.evaluate import evaluate
from headgate.cli.export import export
from headgate.cli.generate import generate
from headgate.cli.info import env, schema
from headgate.cli.inspect import inspect
from headgate.cli.report import report
from headgate.cli.runs import cite, diff, runs
from headgate.cli.sources import sources
from headgate.cli.sweep import sweep
from headgate.cli.train import train
from headgate.cli.validate import validate
from headgate.cli.verify import verify
from headgate.errors import ConfigError, EndedElsewhere, HeadgateError
from headgate.training import processes

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Routed and gated fine-tuning of language models, with the evidence.",
)
app.command()(train)
app.command()(compare)
app.command()(sweep)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(export)
app.command()(inspect)
app.command()(verify)
app.command()(report)
app.command()(runs)
app.command()(diff)
app.command()(cite)
app.command()(bench)
app.command()(validate)
app.command()(sources)
app.command()(data)
app.command()(schema)
app.command()(env)


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries underneath are not part of this program's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


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
    keep_freed_memory()
    warnings.simplefilter("ignore", FutureWarning)  # advice to the libraries' own authors
    quiet_libraries()
    try:
        refuse_ranks(sys.argv[1:])
        app(standalone_mode=True)
    except KeyboardInterrupt:
        if processes.is_writer():
            print("interrupted", file=sys.stderr)
            processes.say_last_word()
        else:
            processes.await_last_word()
        sys.exit(130)
    except EndedElsewhere as error:
        processes.await_last_word()
        sys.exit(error.code)
    except HeadgateError as error:
        if debug:
            raise
        if processes.is_writer() or processes.world_size() > 1:  # before they meet, all ranks fail alike
            print(f"error: {error}", file=sys.stderr, flush=True)
        processes.say_last_word()
        sys.exit(processes.exit_code(error))
    except OSError as error:
        if debug:
            raise
        print(
            f"error: {error.strerror or error}: {error.filename or ''} (--debug shows where)", file=sys.stderr
        )
        processes.say_last_word()
        sys.exit(1)
    except Exception:
        if processes.world_size() == 1:
            raise
        traceback.print_exc()  # now, not when the interpreter ends: the other ranks wait for the last word
        processes.say_last_word()
        sys.exit(1)
    finally:
        processes.leave()


if __name__ == "__main__":
    main()
