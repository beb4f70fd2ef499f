"""Two gloo processes with different data take the same decisions and stay bitwise equal."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

CASES = {"chunked": {"loss": "chunked"}, "plain": {"loss": "plain"}}


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
    from headgate.methods.backward_gate import BackwardGate
    from headgate.models.load import load_model
    from headgate.training.trainer import HeadgateTrainer
    from tests.training.conftest import make_rows, trained

    for name, options in CASES.items():
        model, tokenizer = load_model("random:llama", lora={"dropout": 0.1}, seed=1, device="cpu")
        gate = BackwardGate(m=64, k=8, window=16, burn_in=2, target_acceptance=0.4)
        trainer = HeadgateTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=f"{folder}/{name}",
                max_steps=10,
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
            train_dataset=make_rows(96),
            data_collator=Collator(tokenizer.pad_token_id),
            methods=[gate],
            **options,
        )
        quiet(trainer)
        trainer.train()
        state = {f"gate/{k}": v.to_dense() for k, v in gate.state_dict().items()}
        torch.save({**trained(trainer), **state}, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate-replicas")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_work, args=(port, str(folder)), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_gated_replicas_are_bitwise_equal(replicas: Path, case: str) -> None:
    one, two = (torch.load(replicas / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1))
    local = {n for n in one if "diagnostic" in n}
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one.keys() - local)
    assert 4 <= int(one["gate/gate.accepted"]) < int(one["gate/gate.offered"]) == 20
