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


def _reduce(rank: int, folder: str) -> None:
    from headgate.training.replicas import all_agree, average_gradients, broadcast, sum_across_ranks

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    one, two, idle = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    one.grad = torch.full((2, 3), 1.0 + rank)
    if rank == 1:
        two.grad = torch.arange(6.0).view(2, 3)
    average_gradients([one, two])
    own = torch.tensor([float(rank), 5.0])
    broadcast([own])
    agreed = [all_agree(torch.tensor(vote)) for vote in (True, rank == 0, rank == 1, False)]
    total = sum_across_ranks(torch.tensor([1.0, 10.0 * rank]))
    found = {
        "one": one.grad,
        "two": two.grad,
        "idle": idle.grad,
        "own": own,
        "agreed": agreed,
        "total": total,
    }
    torch.save(found, f"{folder}/{rank}.pt")


def test_gradients_are_the_mean_over_ranks_and_decisions_their_conjunction(tmp_path: Path) -> None:
    """Against numbers, not against each other: ranks that sum alike and accept alike agree in being wrong."""
    on_two_ranks(_reduce, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["one"], torch.full((2, 3), 1.5))
        assert torch.equal(found["two"], torch.arange(6.0).view(2, 3) / 2), (
            "a missing gradient counts as zero"
        )
        assert found["idle"] is None, "what was not named is left alone"
        assert found["agreed"] == [True, False, False, False]
        assert found["own"].tolist() == [0.0, 5.0] and found["total"].tolist() == [2.0, 10.0]
