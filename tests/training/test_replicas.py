"""Two gloo processes stay bitwise equal under every accept/reject pattern, stages included."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

PATTERNS = ["11", "10", "01", "00", "0110"]


def _work(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    from transformers import TrainingArguments

    from headgate.data.collation import Collator
    from headgate.experiments.run import quiet
    from headgate.methods.stage import Stage
    from headgate.models.load import load_model
    from headgate.training.trainer import HeadgateTrainer
    from tests.training.conftest import Toy, make_rows, trained

    for pattern in PATTERNS:
        torch.manual_seed(rank)  # replicas that start apart must not stay apart
        model, tokenizer = load_model("random:llama", lora={"dropout": 0.1}, seed=1 + rank, device="cpu")
        trainer = HeadgateTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=f"{folder}/{pattern}",
                max_steps=4,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
                seed=3,
            ),
            train_dataset=make_rows(32),
            data_collator=Collator(tokenizer.pad_token_id),
            methods=[Toy(pattern=pattern)],
            stages=[
                Stage(name="one", share=0.5, train={"scale": 1e-2}),
                Stage(name="two", share=0.5, train={"lora": 1e-2, "scale": 1e-2}),
            ],
        )
        quiet(trainer)
        trainer.train()
        torch.save(trained(trainer), f"{folder}/{pattern}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every pattern trained by one pair of processes."""
    folder = tmp_path_factory.mktemp("replicas")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_work, args=(port, str(folder)), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.parametrize("pattern", PATTERNS)
def test_replicas_stay_bitwise_equal(replicas: Path, pattern: str) -> None:
    one, two = (torch.load(replicas / f"{pattern}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
