"""The processes of one run: who writes, what all agree on, and how they end together.

Rank 0 is the writer. Control messages go over a group of their own on the CPU (NCCL moves no CPU tensor), which waits
as long as it takes: the followers stand still while the writer generates, verifies or writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from headgate.errors import ConfigError, DataError, EndedElsewhere, HeadgateError, ModelError, TrainingError
from headgate.models.devices import choose_device

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PATIENCE = timedelta(days=7)
"""A rank that dies closes its connections, which ends a wait at once; nothing else should."""

T = TypeVar("T")

_control: dist.ProcessGroup | None = None
_runs = 0
_first_in = -1


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the run; as the launcher gave it, before the processes have met and after they part."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def is_writer() -> bool:
    return rank() == 0


ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed steps its optimizer inside backward, so micro-batches cannot be gated",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP shards the adapters too, and reduces them where ranks may skip different blocks",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM brings a model and a loop of its own",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config spreads what Headgate replicates",
}
"""What ``accelerate launch`` says of an engine that would take the loop over, and why it may not."""
PLAIN = "launch with headgate train --nproc, torchrun or accelerate launch --multi_gpu; model.parallel: {fsdp: N} shards the base"


def refuse_other_engines() -> None:
    """Raises ConfigError where the launcher asks for an engine that would break gating or routing."""
    for variable, why in ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(f"{variable}: {why}: {PLAIN}")


def join(device: str) -> None:
    """Meet the other processes that torchrun, accelerate or ``--nproc`` started; one process alone stays alone."""
    refuse_other_engines()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}: start with headgate train --nproc, "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", device_id=chosen)
    elif chosen.type == "cpu":
        dist.init_process_group("gloo", timeout=PATIENCE)
    else:
        raise ConfigError(f"several ranks run on cuda or cpu, not on {chosen.type}: set model.device: cpu")
    control_group()


def leave() -> None:
    """Part from the others; whoever waits for this process is then told that it has gone."""
    global _control
    _control = None
    if dist.is_available() and dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()


def control_group() -> dist.ProcessGroup:
    """The group of all ranks that carries CPU tensors. The first call is collective."""
    global _control
    if _control is None:
        _control = dist.new_group(backend="gloo", timeout=PATIENCE)
    group: dist.ProcessGroup = _control
    return group


def exchange(values: Sequence[float]) -> list[float]:
    """The sums over ranks of a few numbers, in one message."""
    if world_size() == 1:
        return list(values)
    packed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(packed, group=control_group())
    sums: list[float] = packed.tolist()
    return sums


def gather(value: T) -> list[T]:
    """Every rank's ``value``, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier(group=control_group())


def on_writer(action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on every rank; where it fails, every rank ends and rank 0 says why."""
    if world_size() == 1:
        return action()
    message: list[tuple[T] | tuple[bool, int] | None] = [None]
    failure: BaseException | None = None
    if is_writer():
        try:
            message = [(action(),)]
        except BaseException as error:
            failure = error
            message = [(isinstance(error, KeyboardInterrupt), exit_code(error))]
    dist.broadcast_object_list(message, src=0, group=control_group())
    if failure is not None:
        raise failure
    (told,) = message
    assert told is not None
    if len(told) == 2:
        interrupted, code = told
        raise KeyboardInterrupt if interrupted else EndedElsewhere("rank 0 has said why", code)
    return told[0]


def begin_run() -> None:
    """Failures are counted anew for every run of these processes."""
    global _runs
    _runs += 1


@contextmanager
def failing_together(record: Callable[[BaseException], None] = lambda _error: None) -> Iterator[None]:
    """Where several ranks fail, the first keeps its error, after ``record``; the others end as EndedElsewhere.

    A rank that fails alone takes the others with it: its connections close, and their next collective fails.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fails_first()
        raise
    except EndedElsewhere:
        raise
    except Exception as error:
        if not _fails_first():
            raise EndedElsewhere(str(error), exit_code(error)) from error
        if world_size() > 1 and _lost_connection(error):
            gone = TrainingError(
                "another rank ended without saying why (killed, or out of memory?): run again, which goes on from the "
                "newest checkpoint"
            )
            record(gone)
            raise gone from error
        record(error)
        raise


def _store() -> Store:
    return dist.distributed_c10d._get_default_store()


def _fails_first() -> bool:
    """Whether no other rank has failed in this run before."""
    global _first_in
    if world_size() == 1 or _first_in == _runs:
        return True
    try:
        if int(_store().add(f"headgate/failures/{_runs}", 1)) > 1:
            return False
        _first_in = _runs
        return True
    except Exception:  # the store went with the rank that kept it, which has spoken
        return False


def say_last_word() -> None:
    """Called once the user has been told why the run ends: the other ranks may go."""
    if world_size() > 1:
        with suppress(Exception):
            _store().set(f"headgate/word/{_runs}", "said")


def await_last_word(seconds: float = 10.0) -> None:
    """A rank that ends in silence waits for the one that speaks: the launcher stops all when the first one is gone."""
    if world_size() > 1:
        with suppress(Exception):
            _store().wait([f"headgate/word/{_runs}"], timedelta(seconds=seconds))


def exit_code(error: BaseException) -> int:
    """As the command line ends: 2 a recipe or an argument is wrong, 1 something failed, 130 interrupted."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, EndedElsewhere):
        return error.code
    return 2 if isinstance(error, (ConfigError, DataError, ModelError)) else 1


def _lost_connection(error: BaseException) -> bool:
    """Whether ``error`` is how the network says that another process has gone."""
    if isinstance(error, HeadgateError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(
        sign in str(error).lower()
        for sign in ("gloo", "connection closed", "connection reset", "broken pipe")
    )
