"""Several ranks of one command on this machine, through torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

import torch

from headgate.errors import ConfigError
from headgate.models.devices import choose_device


def launch(arguments: Sequence[str], processes: int, device: str) -> int:
    """``headgate ARGUMENTS`` on ``processes`` ranks; the exit code of the rank that ended first with one.

    Raises ConfigError inside a launcher's rank, and for more ranks than there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--nproc starts the ranks itself: leave it out under torchrun or accelerate launch")
    if choose_device(device).type == "cuda" and processes > torch.cuda.device_count():
        raise ConfigError(
            f"--nproc {processes}, but this machine shows {torch.cuda.device_count()} GPUs: one rank takes one"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.disable(logging.ERROR)  # the rank that fails says why; the launcher's tables would bury it
    ranks = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    sys.stdout.flush()
    try:
        parsed = parse_args([*ranks, "-m", "headgate.cli.main", *arguments])
        torchrun(parsed)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stop:
        return 130 if stop.sigval in (signal.SIGINT, signal.SIGTERM) else 128 + int(stop.sigval)
    return 0
