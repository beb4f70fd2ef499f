"""Two gloo processes stay bitwise equal under every accept/reject pattern, stages included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.ranks import arguments, on_two_ranks

PATTERNS = ["11", "10", "01", "00", "0110"]


def _work(rank: int, folder: str) -> None:
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
            args=arguments(f"{folder}/{pattern}", max_steps=4),
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


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every pattern trained by one pair of processes."""
    return on_two_ranks(_work, tmp_path_factory.mktemp("replicas"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_replicas_stay_bitwise_equal(replicas: Path, pattern: str) -> None:
    one, two = (torch.load(replicas / f"{pattern}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
