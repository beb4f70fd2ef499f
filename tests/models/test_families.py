"""Every family: its parts are found, LoRA attaches and gets gradients, surgery is undone bitwise."""

from __future__ import annotations

import pytest
import torch

from headgate.errors import HeadgateError, ModelError
from headgate.models.anatomy import describe
from headgate.models.load import choose_dtype, load_model
from headgate.models.surgery import head_bypassed, head_input_captured, on_block_output, on_linear

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"]


def ids() -> torch.Tensor:
    return torch.randint(3, 1000, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_lora_and_surgery(family: str) -> None:
    model, _ = load_model(f"random:{family}", lora={"dropout": 0.0}, seed=1, device="cpu")
    anatomy = describe(model)
    assert anatomy.num_blocks == 4 and anatomy.hidden_size == 64
    assert {"q", "k"} & {
        name.split(".")[-1][0] for name, _ in anatomy.linears(anatomy.blocks[0])
    } or family in (
        "phi3",
        "gpt2",
        "gpt_neox",
    )
    inputs = ids()
    with torch.no_grad():
        before = model(input_ids=inputs).logits
    handles = [
        on_block_output(anatomy.blocks[1], lambda h: h * 1.5),
        on_linear(next(iter(anatomy.linears(anatomy.blocks[0])))[1], lambda x: None),
    ]
    with torch.no_grad():
        assert not torch.equal(model(input_ids=inputs).logits, before)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(input_ids=inputs).logits, before)
    model(input_ids=inputs, labels=inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


@pytest.mark.parametrize("family", FAMILIES)
def test_head_input_times_head_is_the_logits(family: str) -> None:
    model, _ = load_model(f"random:{family}", device="cpu")
    anatomy = describe(model)
    with torch.no_grad(), head_input_captured(anatomy.head) as captured:
        logits = model(input_ids=ids()).logits
    again = anatomy.head(captured[0])
    if anatomy.softcap:
        again = anatomy.softcap * torch.tanh(again / anatomy.softcap)
    assert torch.allclose(again, logits, atol=1e-5)
    with torch.no_grad(), head_bypassed(anatomy.head) as bypassed:
        model(input_ids=ids())
    assert torch.equal(bypassed[0], captured[0])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, logits)


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        ("random:lama", None, "did you mean 'llama'"),
        ("./no/such/folder", None, "does not exist"),
        ("random:llama", {"target_modules": ["q_porj"]}, "did you mean 'q_proj'"),
        ("random:llama", {"layers": [9]}, "outside the model's 4 blocks"),
        ("random:llama", {"rr": 4}, "unknown key"),
    ],
)
def test_bad_models_are_named(name: str, lora: dict | None, message: str) -> None:
    with pytest.raises(HeadgateError, match=message):
        load_model(name, lora=lora, device="cpu")


def test_folder_without_weights(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        load_model(str(tmp_path))


def test_4bit_without_cuda_is_refused() -> None:
    with pytest.raises(ModelError, match="needs CUDA"):
        load_model("random:llama", load_in_4bit=True, device="cpu")


def test_bf16_on_a_slow_cpu_is_adjusted(monkeypatch) -> None:
    monkeypatch.setattr("headgate.models.devices.cpu_has_fast", lambda dtype: False)
    with pytest.warns(UserWarning, match="using float32"):
        assert choose_dtype("bfloat16", torch.device("cpu")) is torch.float32


def test_same_seed_same_adapter() -> None:
    """Pairing: every arm of a comparison starts from the same LoRA weights."""
    one, _ = load_model("random:llama", lora={}, seed=5, device="cpu")
    torch.manual_seed(99)
    two, _ = load_model("random:llama", lora={}, seed=5, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
