"""Laws of export: plain PEFT reproduces what it can, and what it cannot is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from headgate.errors import CheckpointError, ConfigError
from headgate.evaluation.perplexity import perplexity
from headgate.experiments import export as exporting
from headgate.experiments.best_mixture import validation_rows
from headgate.experiments.recipe_file import recipe_from
from headgate.experiments.run import run
from headgate.experiments.run_directory import RunDirectory
from headgate.methods.compose import MethodStack
from headgate.methods.lora_experts import LoraExperts
from headgate.methods.lora_experts.export import concatenated, mixtures, usage_weights
from headgate.models.load import load_model
from headgate.modules.prototype_router import PrototypeRouter
from headgate.training.checkpoint import restore_methods, seal

from .conftest import SMALL, batch_of, logits_of, louden, model_of, stream_stages, trainer_of


def test_the_closed_form_router_is_linear_discriminant_analysis() -> None:
    """Against Gaussian log-densities with the shrunk pooled covariance; the order of the looks does not matter.

    A skill that goes takes its scatter along: what is left is the router that never met it.
    """
    stream = torch.Generator().manual_seed(0)
    looks = {n: torch.randn(60, 4, generator=stream) * (1 + i) + 3 * i for i, n in enumerate("abc")}
    routers = []
    for order in ("abc", "cab"):
        router = PrototypeRouter(4)
        for name in order:
            for part in looks[name].split(25):
                router.learn(name, part)
        routers.append(router)
    x = torch.randn(9, 4, generator=stream) + 3

    def densities(names: str) -> torch.Tensor:
        means = torch.stack([looks[n].mean(0) for n in names])
        centred = [looks[n] - looks[n].mean(0) for n in names]
        pooled = sum(rows.T @ rows for rows in centred) / (60 * len(names))
        pooled = pooled + 1e-2 * pooled.diagonal().mean() * torch.eye(4)
        return torch.distributions.MultivariateNormal(means, pooled).log_prob(x[:, None])

    for router in routers:
        torch.testing.assert_close(
            router(x, "abc").softmax(-1), densities("abc").softmax(-1), atol=1e-4, rtol=1e-3
        )
    routers[0].remove("b")
    torch.testing.assert_close(
        routers[0](x, "ac").softmax(-1), densities("ac").softmax(-1), atol=1e-4, rtol=1e-3
    )


def test_an_expert_of_several_skills_has_the_best_of_their_logits_and_one_of_none_has_zero() -> None:
    stream, router = torch.Generator().manual_seed(0), PrototypeRouter(4)
    for at, owner in enumerate("abac"):
        router.learn(owner, torch.randn(40, 4, generator=stream) + at, new=True)
    x = torch.randn(2, 5, 4, generator=stream)
    logits = x @ router.weight.T + router.bias
    wanted = {
        "a": logits[..., [0, 2]].amax(-1),
        "b": logits[..., 1],
        "c": logits[..., 3],
        "none": x.new_zeros(2, 5),
    }
    for names in (["c", "none", "a", "b"], ["a"], ["none"]):
        torch.testing.assert_close(router(x, names), torch.stack([wanted[name] for name in names], -1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    trainer = trainer_of(folder, LoraExperts(**SMALL), stages=stream_stages(3), seed=1)
    trainer.base_model = {"name_or_path": "random:llama"}
    trainer.train()
    louden(trainer.methods.methods[0])
    trainer.save_model(str(folder / "saved"))
    return folder / "saved"


def test_exported_experts_are_plain_peft_and_equal_the_routed_model(saved: Path, tmp_path: Path) -> None:
    """One folder an expert, checked by PEFT alone; the mixture is the weighted sum of the updates, exactly."""
    done = exporting.export(saved, tmp_path / "out", "experts")
    assert done.difference < 1e-5
    measured, chosen = done.notes
    assert "no loss was measured" in measured and "no chooser was written" in chosen
    assert (
        json.loads((tmp_path / "out" / "headgate_export.json").read_text())["difference"] == done.difference
    )
    method_model, anatomy = model_of()
    (method,) = exporting.load(saved, device="cpu")[0].headgate_methods
    method.detach()
    method.attach(anatomy)
    batch = batch_of()
    for number in range(3):
        plain = peft.PeftModel.from_pretrained(
            model_of()[0], str(tmp_path / "out" / f"expert_{number}")
        ).eval()
        method.set_routing(f"expert:{number}")
        torch.testing.assert_close(
            logits_of(plain, **batch), logits_of(method_model, **batch), atol=1e-5, rtol=1e-4
        )
    weights = usage_weights(method.experts)
    assert sum(weights.values()) == pytest.approx(1)
    for site, (down, up) in concatenated(method.experts, weights).items():
        wanted = sum(
            weights[info.number] * info.scale * expert.up.T @ expert.down
            for info in method.experts.roster
            if (expert := method.experts.bank(site).expert(info.name))
        )
        torch.testing.assert_close(up.T @ down, wanted, atol=1e-6, rtol=1e-5)
    mixture = peft.PeftModel.from_pretrained(model_of()[0], str(tmp_path / "out" / "mixture")).eval()
    config = mixture.peft_config["default"]
    assert config.r == 2 + 3 + 3 and config.lora_alpha == config.r
    method.set_routing(mixtures(method.experts)["mixture by usage in training"])
    torch.testing.assert_close(
        logits_of(mixture, **batch), logits_of(method_model, **batch), atol=1e-5, rtol=1e-4
    )


def test_a_mixture_of_ones_own(saved: Path, tmp_path: Path) -> None:
    """Weights by skill or number, some experts left out; nonsense is named before anything is written."""
    done = exporting.export(saved, tmp_path / "out", "experts", mixture="adding=0.25,2=0.5")
    config = json.loads((tmp_path / "out" / "mixture" / "adapter_config.json").read_text())
    assert config["r"] == 2 + 3 and done.difference < 1e-5
    for asked, said in (
        ("adding", "is not <number or skill>=<weight>"),
        ("adding=x", "is not <number or skill>=<weight>"),
        ("addin=1", "there is no expert 'addin'"),
        ("adding=1,0=1", "give expert 0 one finite weight"),
        ("adding=nan", "one finite weight"),
    ):
        with pytest.raises(ConfigError, match=said):
            exporting.export(saved, tmp_path / "no", "experts", mixture=asked)
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="belongs to --to experts"):
        exporting.export(saved, tmp_path / "no", "merged", mixture="adding=1")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of two skills on the command line's own path."""
    folder = tmp_path_factory.mktemp("run")

    def skill(name: str) -> dict[str, Any]:
        source = {"source": "wordmath", "limit": 24, "options": {"families": [name]}}
        return {
            "skill": name,
            "steps": 3,
            **source,
            "split": "train",
            "validation": {**source, "split": "validation", "limit": 8},
        }

    recipe = {
        "name": "two-skills",
        "output_dir": str(folder),
        "model": {"name_or_path": "embedded"},
        "lora": None,
        "data": {"max_length": 192, "stream": [skill("farm"), skill("sports")]},
        "training": {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_every": 3},
        "methods": {"lora_experts": {"router": "prototype", "maturity_steps": 2, "r": 2, "new_r": 2}},
    }
    return run(recipe_from(recipe)).path


def test_the_best_single_merge_comes_with_its_measured_loss(run_folder: Path, tmp_path: Path) -> None:
    """Every note's figure is that routing's loss on the run's validation rows, and the least was exported."""
    done = exporting.export(run_folder, tmp_path / "out", "experts")
    model, tokenizer = exporting.load(run_folder, device="cpu")
    (method,) = model.headgate_methods
    base, _ = load_model("embedded", lora=None, device="cpu")
    told = [note for note in done.notes if note.startswith("validation loss, ")]
    losses = dict(note.removeprefix("validation loss, ").split(": ") for note in told)
    assert sum(note.startswith("chooser, ") for note in done.notes) == 2
    assert set(losses) == {"routed", *mixtures(method.experts), "expert 0 alone", "expert 1 alone"}
    rows = validation_rows(RunDirectory(run_folder).recipe())
    assert sorted(rows) == ["farm", "sports"]
    plain = peft.PeftModel.from_pretrained(base, str(tmp_path / "out" / "mixture")).eval()
    again = [perplexity(plain, tokenizer, part, length=192)[0]["loss"] for part in rows.values()]
    best = min(float(losses[name]) for name in mixtures(method.experts))
    assert sum(again) / 2 == pytest.approx(best, abs=2e-4)


def test_what_depends_on_the_token_is_not_merged(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gates of lora_experts depend on the token.*--to experts"):
        exporting.export(saved, tmp_path / "merged", "merged")
    with pytest.raises(ConfigError, match="export it with --to experts"):
        exporting.export(saved, tmp_path / "peft", "peft")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_state_is_an_error_and_never_the_base(saved: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, tmp_path / "broken")
    state = load_file(saved / "headgate.safetensors")
    victim = next(n for n in state if ".experts.1." in n)
    save_file({n: t for n, t in state.items() if n != victim}, tmp_path / "broken" / "headgate.safetensors")
    with pytest.raises(CheckpointError, match=r"headgate\.safetensors has changed"):
        exporting.load(tmp_path / "broken", device="cpu")
    seal(tmp_path / "broken")  # somebody who meant it: then the state itself must fit
    with pytest.raises(CheckpointError, match="does not fit"):
        exporting.load(tmp_path / "broken", device="cpu")


def test_what_another_version_wrote_is_said_to_be_that(saved: Path, tmp_path: Path) -> None:
    """A structure without a key that is read today, loaded and resumed: no KeyError."""
    import shutil

    shutil.copytree(saved, tmp_path / "older")
    description = json.loads((saved / "headgate.json").read_text())
    del description["methods"]["lora_experts"]["trial"]
    (tmp_path / "older" / "headgate.json").write_text(json.dumps(description))
    seal(tmp_path / "older")
    told = r"written by another version of Headgate \(its structure has no 'trial'\)"
    with pytest.raises(CheckpointError, match=told):
        exporting.load(tmp_path / "older", device="cpu")
    method = LoraExperts()
    method.attach(model_of()[1])
    with pytest.raises(CheckpointError, match=told):
        restore_methods(tmp_path / "older", MethodStack([method]))
