"""Two gloo processes on one machine, and the trainer arguments that they share."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def on_two_ranks(work: Callable[[int, str], None], folder: Path) -> Path:
    """``work(rank, folder)`` in two processes joined by gloo; ``work`` is a function of a module."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_joined, args=(port, work, str(folder)), nprocs=2, start_method="spawn")
    return folder


def _joined(rank: int, port: int, work: Callable[[int, str], None], folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    work(rank, folder)
    torch.distributed.destroy_process_group()


def arguments(folder: str, **changes: Any) -> Any:
    """TrainingArguments of a short run of two micro-batches a step."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=3,
        **changes,
    )
