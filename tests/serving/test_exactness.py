"""What is exported computes what the live run computes, bit for bit, in families, policies and methods; also where
only torch and transformers are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headgate.experiments.served import load_written
from headgate.models.anatomy import unwrap
from headgate.serving.bundle import closure, modeling_file

from ..layer_routing.conftest import FAMILIES, batch_of
from .conftest import blocks_run, elsewhere, exported, routed, with_experts, with_methods, with_schemas

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
POLICIES: list[dict[str, Any]] = [
    {"policy": "gumbel"},
    {"policy": "gumbel", "granularity": "sample", "prefix_tokens": 4},
    {"policy": "exit", "kv": "drop"},
    {"policy": "topk", "kv": "reuse"},
    {"policy": "reinforce", "granularity": "batch"},
    {"policy": "static", "granularity": "auto", "skip": [1, 3]},
    {"policy": "truncate", "granularity": "auto", "target_utilization": 0.5},
    {"policy": "random", "granularity": "sample", "target_utilization": 0.6},
    {"policy": "stochastic_depth", "granularity": "auto"},
    {"policy": "gumbel", "units": "attention_mlp", "patch": {"rank": 4}},
    {"policy": "gumbel", "features": "prepass"},
    {"policy": "gumbel", "features": "embedding", "engine": "masked"},
]


def same(model: Any, again: Any, *, generates: bool = True) -> None:
    """Bitwise logits, with padding on either side and without; the same greedy tokens."""
    for batch in (batch_of(), batch_of(left=True), batch_of(padded=False)):
        with torch.no_grad():
            wanted, found = model(**batch).logits, again(**batch).logits
        assert torch.equal(wanted, found), (wanted - found).abs().max()
    if generates:
        batch = batch_of(left=True)
        assert torch.equal(model.generate(**batch, **GREEDY), again.generate(**batch, **GREEDY))


@pytest.mark.parametrize("options", POLICIES, ids=lambda o: "-".join(map(str, o.values())))
def test_every_policy(options: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer, method = routed(**options)
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    same(model, again)
    if options["policy"] not in ("stochastic_depth",):
        closed = (method.route.weight == 0).float().mean()  # type: ignore[union-attr]
        assert 0 < closed < 1, "gates that are all alike prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    model, tokenizer, _ = routed(family)
    same(model, load_written(exported(model, tokenizer, tmp_path / "out")))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router_sites": "per_site", "top_k": 1},
        {"granularity": "sequence", "prefix_tokens": 3},
        {"router": "uniform"},
        {"router": "prototype"},
        {"router": "bayes"},
        {"router": "bayes", "granularity": "sequence", "prefix_tokens": 3, "top_k": 1},
        {"features": "prepass"},
        {"features": "block 1", "top_k": 1},
    ],
    ids=str,
)
def test_experts(options: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer, method = with_experts(**options)
    if options.get("router") == "prototype":
        stream = torch.Generator().manual_seed(1)
        for number in range(3):
            width = method.experts.routers.closed_form.features  # type: ignore[union-attr]
            rows = torch.randn(50, width, generator=stream) + number
            method.experts.routers.closed_form.learn(str(number), rows)  # type: ignore[union-attr]
    method.experts.roster.infos[1].skills.append("sorting")
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    same(model, again)
    for route in ("removed", "expert:sorting", "mixture:0=.5,sorting=.5", "arrow", "on"):
        method.set_routing(route)
        again.set_routing(route)
        same(
            model, again, generates=route == "arrow"
        )  # the only one with gates that the first look has not decoded with


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_experts_of_families(family: str, tmp_path: Path) -> None:
    model, tokenizer, _ = with_experts(family)
    same(model, load_written(exported(model, tokenizer, tmp_path / "out")))


@pytest.mark.parametrize(
    "options", [{}, {"gating": "dense", "attributes": "scalar"}, {"attributes": "router"}], ids=str
)
def test_schemas_that_are_kept(options: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer, method = with_schemas(**options)
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    same(model, again)
    method.set_routing("removed")
    again.set_routing("removed")
    same(model, again)


def test_two_methods_at_once(tmp_path: Path) -> None:
    model, tokenizer, routing = routed(engine="masked")
    _, _, schemas = with_schemas()
    schemas.detach()
    routing.detach()
    from headgate.methods.compose import MethodStack
    from headgate.models.anatomy import describe

    MethodStack([routing, schemas]).attach(describe(model))
    with_methods(model, routing, schemas)
    same(model, load_written(exported(model, tokenizer, tmp_path / "out")))


def test_merged_weights_are_close_and_not_equal(tmp_path: Path) -> None:
    model, tokenizer, _ = routed(policy="static", granularity="auto", skip=[2])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        wanted = model(**batch_of()).logits
    again = load_written(exported(model, tokenizer, tmp_path / "out", merge=True))
    found = again(**batch_of()).logits
    assert not torch.equal(wanted, found) and torch.allclose(
        wanted, found, atol=1e-4 * float(wanted.abs().max())
    )
    assert not any("lora" in name for name in again.state_dict())


SCRIPT = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in {folders!r}:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("Tom has three apples.", return_tensors="pt")
    ran = []
    for number, layer in enumerate(model.base.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    new = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    counted = list(ran)
    with torch.no_grad():
        torch.save(model(**ids).logits, folder + ".logits")
    print(json.dumps([new[0].tolist(), counted, str(type(model).__module__)]))
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    print("refused:", str(error).replace(chr(10), " ")[:400])
"""


def test_with_torch_and_transformers_only(tmp_path: Path) -> None:
    """The hostile case: no Headgate, no PEFT, another process. Tokens, blocks run and logits are the live run's; a loader
    that trusts no code refuses the folder rather than load the base without its routing."""
    made = {
        "token": routed(),
        "sample": routed(granularity="sample", prefix_tokens=4),
        "static": routed(policy="static", granularity="auto", skip=[1, 2]),
        "experts": with_experts(),
        "schemas": with_schemas(),
    }
    folders = [
        str(exported(model, tokenizer, tmp_path / kind)) for kind, (model, tokenizer, _) in made.items()
    ]
    *lines, refused = elsewhere(SCRIPT.format(folders=folders), tmp_path).splitlines()
    assert refused.startswith("refused:") and "contains custom code" in refused
    for (kind, (model, tokenizer, _)), folder, line in zip(made.items(), folders, lines, strict=True):
        ids = tokenizer("Tom has three apples.", return_tensors="pt")
        ran, stop = blocks_run(model, unwrap(model))
        new = model.generate(**ids, **GREEDY)
        stop()
        tokens, blocks, module = json.loads(line)
        assert module.endswith("modeling_headgate"), "it is the file in the folder that ran"
        assert tokens == new[0].tolist() and blocks == ran, kind
        with torch.no_grad():
            assert torch.equal(torch.load(folder + ".logits"), model(**ids).logits), kind
        if kind in ("token", "static"):
            assert len(blocks) < 12 * 4, "no block was skipped: this proves nothing"


def test_with_headgate_no_remote_code_is_needed(tmp_path: Path) -> None:
    import headgate.serving

    model, tokenizer, _ = routed()
    folder = exported(model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(again, headgate.serving.HeadgateForCausalLM)
    same(model, again)
    again.save_pretrained(tmp_path / "twice")
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "twice"))


def test_it_is_for_inference(tmp_path: Path) -> None:
    model, tokenizer, _ = routed()
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    with pytest.raises(ValueError, match="for inference"):  # the file has a ModelError of its own
        again.train()(**batch_of())


def test_the_file_holds_every_definition_once_and_needs_nothing_else() -> None:
    import ast

    tree = ast.parse(modeling_file())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
    }
    import sys

    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert len(names) == len(set(names))
    with pytest.raises(ImportError, match="defines no 'Absent'"):
        closure("headgate.serving.modeling", ("Absent",))


@pytest.mark.parametrize("kind", ["routing", "experts"])
def test_half_precision_leaves_routers_and_adapters_in_full(kind: str, tmp_path: Path) -> None:
    """As a GPU trains: the base in bfloat16, everything that was trained in float32."""
    model, tokenizer, _ = routed() if kind == "routing" else with_experts()
    base = unwrap(model)
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    again = load_written(exported(model, tokenizer, tmp_path / "out"))
    kinds = {name: tensor.dtype for name, tensor in again.named_parameters()}
    own = {dtype for name, dtype in kinds.items() if "lora_" in name or name.startswith("methods.")}
    rest = {dtype for name, dtype in kinds.items() if not ("lora_" in name or name.startswith("methods."))}
    assert own == {torch.float32} and rest == {torch.bfloat16}
    same(model, again)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, tokenizer, _ = routed("gemma2")
    assert unwrap(model).config.tie_word_embeddings
    folder = exported(model, tokenizer, tmp_path / "out")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "base.lm_head.weight" not in set(file.keys())
    again = load_written(folder)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_shards(tmp_path: Path) -> None:
    model, tokenizer, _ = routed()
    folder = exported(model, tokenizer, tmp_path / "out", max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    same(model, load_written(folder))
