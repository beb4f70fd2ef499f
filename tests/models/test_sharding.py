"""A base spread over two ranks computes what it computes whole, to the last bit, whatever the ranks disagree about.

The hostile case comes first: each rank leaves other blocks out. Gathered in another order, blocks of one shape would read
each other's weights and no error would tell.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from headgate.errors import ConfigError
from headgate.models.config import LoraConfig, ModelConfig, ParallelConfig
from tests.training.ranks import on_two_ranks

SHAPES = ("random:llama", "random:gemma2", "embedded")
"""Head and embeddings apart; tied, made in memory; tied, read from files."""
SKIPPED = ((1, 2), (0, 3))
"""By rank."""
KEPT_MEGABYTES = 144


def _small_llama(folder: Path) -> Path:
    """144 MB of weights in files, tied to nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from headgate.models.load import EMBEDDED

    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    return folder


def _private_memory() -> int:
    """Bytes of this process that are no file's (weights are read through a map of their file)."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


class Peak:
    """The most private memory while inside, above what there was before."""

    def __enter__(self) -> Peak:
        self.before = self.most = _private_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.most = max(self.most, _private_memory())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.most - self.before


def _model(name: str, parallel: ParallelConfig | None, checkpointing: bool) -> Any:
    from headgate.models.load import load_base, prepare_model

    config = ModelConfig(
        name_or_path=name, device="cpu", parallel=parallel, activation_checkpointing=checkpointing
    )
    base, _ = load_base(config, seed=3)
    model = prepare_model(base, config, LoraConfig(r=2, dropout=0.0), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # B of zeros would leave A without a gradient
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    return model.train()


def _step(model: Any, ids: Tensor, skipped: tuple[int, ...]) -> dict[str, Tensor]:
    """Loss and gradients of a batch with some blocks left out."""
    from headgate.models.anatomy import describe
    from headgate.models.surgery import override_forward

    blocks = describe(model).blocks
    handles = [override_forward(blocks[i], lambda _: lambda hidden, *_a, **_k: hidden) for i in skipped]
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def _stopped(model: Any, ids: Tensor) -> None:
    """Both ranks leave the same forward after its second block."""
    from headgate.methods.step import ForwardStopped
    from headgate.models.anatomy import describe
    from headgate.models.sharding import forward_was_stopped
    from headgate.models.surgery import on_block_output

    def stop(_hidden: Tensor) -> Tensor:
        raise ForwardStopped

    anatomy = describe(model)
    handle = on_block_output(anatomy.blocks[1], stop)
    with pytest.raises(ForwardStopped):
        model(input_ids=ids, labels=ids, use_cache=False)
    handle.remove()
    forward_was_stopped(anatomy.model)


def _work(rank: int, folder: str) -> None:
    from headgate.models.sharding import is_sharded, resident, whole

    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    ids = torch.arange(24).view(2, 12) * (rank + 2) % 700 + 5
    for name in SHAPES:
        for checkpointing in (False, True):
            model, alone = (
                _model(name, parallel, checkpointing) for parallel in (ParallelConfig(fsdp=2), None)
            )
            furthest, steps = 0.0, []
            at_rest = resident(model.get_base_model())
            for skipped in ((), SKIPPED[rank], ()):
                steps.append((_step(model, ids, skipped), _step(alone, ids, skipped)))
                with torch.no_grad():
                    model(input_ids=ids[:1])
                _stopped(model, ids)
            for sharded, plain in steps:
                assert sharded.keys() == plain.keys() and len(plain) > 1
                furthest = max(furthest, *(float((sharded[k] - plain[k]).abs().max()) for k in plain))
            blocks = sorted(
                {key.split("layers.")[1].split(".")[0] for key in steps[1][0] if "layers." in key}
            )
            bases = zip(model.get_base_model().parameters(), alone.get_base_model().parameters(), strict=True)
            found[f"{name} {checkpointing}"] = {
                "sharded": is_sharded(model) and not is_sharded(alone),
                "furthest": furthest,
                "blocks": blocks,
                "at rest": at_rest,
                "weights": all(torch.equal(whole(one), other) for one, other in bases),
            }
    with Peak() as peak:
        model = _model(f"{folder}/base", ParallelConfig(fsdp=2), False)
    found["loading"] = {"peak": peak.bytes, "resident": resident(model.get_base_model())}
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    _small_llama(folder / "base")
    on_two_ranks(_work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", SHAPES)
def test_ranks_that_leave_other_blocks_out_read_their_own_weights(
    two: list[dict[str, Any]], name: str, checkpointing: bool
) -> None:
    """Loss and every gradient as in the whole model: before, with other blocks left out on each rank, and after a
    forward that was stopped half way."""
    ranks = [found[f"{name} {checkpointing}"] for found in two]
    assert all(rank["sharded"] and rank["weights"] for rank in ranks)
    assert ranks[0]["blocks"] != ranks[1]["blocks"], "the ranks did disagree"
    assert [rank["furthest"] for rank in ranks] == [0.0, 0.0]


@pytest.mark.parametrize("name", SHAPES)
def test_a_rank_holds_half(two: list[dict[str, Any]], name: str) -> None:
    for found in two:
        here, whole = found[f"{name} False"]["at rest"]
        assert here <= 0.55 * whole


def test_a_rank_reads_half(two: list[dict[str, Any]]) -> None:
    """At no time while it loads does a rank hold more than 55% of the weights, buffers of the reading included."""
    for found in two:
        here, whole = found["loading"]["resident"]
        assert whole * 4 > KEPT_MEGABYTES * 1e6 * 0.9
        assert here <= 0.55 * whole
        assert found["loading"]["peak"] <= 0.55 * whole * 4, found["loading"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tensor": 2}, "tensor=2: tensor parallelism is not offered"),
        ({"replicate": 2}, "replicate=2 repeats a base that is spread over fsdp ranks, and fsdp is 1"),
        ({"fsdp": 0}, "greater than or equal to 1"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(given: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ParallelConfig(**given)


def test_packed_weights_are_not_spread() -> None:
    with pytest.raises(ValidationError, match="load_in_4bit: packed weights cannot be spread"):
        ModelConfig(load_in_4bit=True, parallel=ParallelConfig(fsdp=2))


def test_one_process_holds_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was trained on a sharded base is evaluated, verified and exported by one process."""
    from headgate.models.load import load_base
    from headgate.models.sharding import is_sharded

    assert "RANK" not in os.environ
    model, _ = load_base(
        ModelConfig(name_or_path="random:llama", device="cpu", parallel=ParallelConfig(fsdp=2))
    )
    assert not is_sharded(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": None}, "lora: null trains the base itself: set lora, use lora_experts, or leave"),
        ({"lora": {"use_dora": True}}, "lora.use_dora=true: only plain LoRA"),
        ({"lora": {"peft_type": "ia3"}}, "lora.peft_type=ia3: only plain LoRA"),
    ],
)
def test_validate_refuses_what_would_train_or_read_a_sharded_weight(
    changes: dict[str, Any], said: str
) -> None:
    from headgate.experiments.preflight import check_recipe
    from headgate.experiments.recipe import Recipe

    recipe = Recipe(model=ModelConfig(parallel=ParallelConfig(fsdp=2)), **changes)
    with pytest.raises(ConfigError, match=said):
        check_recipe(recipe)


def test_lora_experts_may_do_without_lora() -> None:
    from headgate.experiments.preflight import check_recipe
    from headgate.experiments.recipe import Recipe

    model = ModelConfig(parallel=ParallelConfig(fsdp=2))
    check_recipe(Recipe(model=model, lora=None, methods={"lora_experts": {"experts": 2}}))


def test_where_the_ranks_lie_is_no_part_of_a_runs_identity() -> None:
    from headgate.experiments.recipe import Recipe

    sharded = Recipe(model=ModelConfig(parallel=ParallelConfig(fsdp=2)))
    assert sharded.run_id() == Recipe().run_id()


def test_one_process_does_not_train_what_is_for_two() -> None:
    from headgate.experiments.recipe import Recipe
    from headgate.experiments.resumption import check_ranks

    with pytest.raises(
        ConfigError, match=r"fsdp: 2} is for 2 ranks, and this is one process: headgate train --nproc 2"
    ):
        check_ranks(Recipe(model=ModelConfig(parallel=ParallelConfig(fsdp=2))))


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("ACCELERATE_USE_FSDP", "accelerate's FSDP shards the adapters too"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed steps its optimizer inside backward"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM brings"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "spreads what Headgate replicates"),
    ],
)
def test_other_engines_are_refused_before_any_work(
    variable: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headgate.training import processes

    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=said + r".*model\.parallel: \{fsdp: N\}"):
        processes.join("cpu")
