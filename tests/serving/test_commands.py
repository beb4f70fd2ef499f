"""`headgate generate --lossless | --routing auto`, `headgate push --dry-run`, and what a checkpoint's README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headgate.errors import ModelError
from headgate.experiments import publish
from headgate.experiments.model_card import loading
from headgate.experiments.recipe import Recipe

from ..cli.test_cli import here

PROMPT = ("--prompt", "Tom has three apples.", "--max-new-tokens", 12, "--device", "cpu")


def test_lossless_prints_what_full_depth_prints(by_token: Path) -> None:
    full = here("generate", by_token, "--routing", "removed", *PROMPT)
    found = here("generate", by_token, "--lossless", *PROMPT)
    assert full.returncode == found.returncode == 0, full.stderr + found.stderr
    assert found.stdout == full.stdout and found.stdout.strip()
    streamed = here("generate", by_token, "--lossless", "--stream", *PROMPT)
    assert streamed.stdout.split() == full.stdout.split(), streamed.stderr
    sampled = [
        here("generate", by_token, "--lossless", "--sample", "--seed", s, *PROMPT).stdout for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_what_has_no_depth_or_no_choice_is_named(by_token: Path, experts: Path) -> None:
    done = here("generate", experts, "--lossless", *PROMPT)
    assert done.returncode == 2 and "this model routes no blocks" in done.stderr
    done = here("generate", by_token, "--routing", "auto", *PROMPT)
    assert done.returncode == 2 and "chooses among the experts" in done.stderr
    done = here("generate", by_token, "--removed", "--routing", "on", *PROMPT)
    assert done.returncode == 2 and "say two things" in done.stderr


def test_auto_gives_each_prompt_its_expert(experts: Path) -> None:
    from headgate.data.streams import load_stream
    from headgate.experiments.recipe_file import load_recipe

    loaded = load_recipe(experts / "recipe.yaml")
    for segment in load_stream(loaded.data.stream, loaded.training.max_steps):
        text = segment.validation[0]["prompt"]
        options = ("--prompt", text, "--max-new-tokens", 6, "--device", "cpu")
        auto = here("generate", experts, "--routing", "auto", *options)
        named = here("generate", experts, "--routing", f"expert:{segment.skill}", *options)
        assert auto.returncode == 0 and auto.stdout == named.stdout and "(expert:" in auto.stderr


def test_a_push_is_looked_at_before_it_goes(
    by_token: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "out"
    assert here("export", by_token, "--to", "transformers", "--output", folder).returncode == 0
    done = here("push", folder, "me/routed", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "modeling_headgate.py" in done.stdout and "nothing was sent" in done.stdout
    assert "licence is not filled in" in done.stderr
    for repo, message in (("routed", "names no owner"), ("a/b/c", "no repository name")):
        assert message in here("push", folder, repo, "--dry-run").stderr
    assert "is no export" in here("push", by_token / "checkpoint", "me/routed", "--dry-run").stderr
    assert "has no export-transformers" in here("push", by_token, "me/routed", "--dry-run").stderr
    (folder / "README.md").write_text("# nothing")
    assert "no model card" in here("push", folder, "me/routed", "--dry-run").stderr

    sent: list[tuple[str, str]] = []

    class Hub:
        """Stands where the network is."""

        def create_repo(self, repo: str, **options: object) -> None:
            sent.append(("create", repo))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
            sent.append(("upload", repo_id))
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(publish, "HfApi", Hub)
    publication = publish.Publication("me/routed", {}, {}, [])
    assert publish.publish(folder, publication, private=True).endswith("me/routed")
    assert sent == [("create", "me/routed"), ("upload", "me/routed")]

    def refuse(self: object, repo: str, **options: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(ModelError, match="could not be written: no network here"):
        publish.publish(folder, publication, private=True)


def test_a_checkpoint_says_what_plain_loading_leaves_out(by_token: Path) -> None:
    card = (by_token / "checkpoint" / "README.md").read_text()
    assert "load a part of this" in card and "every block runs" in card and "hg.load" in card
    plain = Recipe.model_validate({"name": "x", "methods": {"schema_bank": {}}})
    assert "PEFT loads all of it" in "\n".join(loading(plain))
    kept = Recipe.model_validate({"name": "x", "methods": {"schema_bank": {"eval_routing": "on"}}})
    assert "its bank" in "\n".join(loading(kept))


def test_an_exported_folder_is_a_model_to_every_verb(by_token: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert here("export", by_token, "--to", "transformers", "--output", folder).returncode == 0
    for how in ((), ("--routing", "removed"), ("--lossless",)):
        live, served = (here("generate", what, *how, *PROMPT) for what in (by_token, folder))
        assert served.returncode == 0, served.stderr
        assert served.stdout == live.stdout, how
    losses = []
    for what in (by_token, folder):
        options = (
            "--task",
            "perplexity",
            "--limit",
            8,
            "--output",
            tmp_path / "p",
            "--json",
            tmp_path / "r.json",
        )
        done = here("eval", what, *options)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((tmp_path / "r.json").read_text())["perplexity_wordmath"]["loss"])
    assert losses[0] == losses[1]
