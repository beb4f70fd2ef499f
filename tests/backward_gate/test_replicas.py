"""Two gloo processes with different data take the same decisions and stay bitwise equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.ranks import arguments, on_two_ranks

CASES = {"chunked": {"loss": "chunked"}, "plain": {"loss": "plain"}}


def _work(rank: int, folder: str) -> None:
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
            args=arguments(f"{folder}/{name}", max_steps=10),
            train_dataset=make_rows(96),
            data_collator=Collator(tokenizer.pad_token_id),
            methods=[gate],
            **options,
        )
        quiet(trainer)
        trainer.train()
        state = {f"gate/{k}": v.to_dense() for k, v in gate.state_dict().items()}
        torch.save({**trained(trainer), **state}, f"{folder}/{name}-{rank}.pt")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_two_ranks(_work, tmp_path_factory.mktemp("gate-replicas"))


@pytest.mark.parametrize("case", CASES)
def test_gated_replicas_are_bitwise_equal(replicas: Path, case: str) -> None:
    one, two = (torch.load(replicas / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1))
    local = {n for n in one if "diagnostic" in n}
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one.keys() - local)
    assert 4 <= int(one["gate/gate.accepted"]) < int(one["gate/gate.offered"]) == 20
