"""``headgate generate RUN --prompt ...``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from transformers import TextStreamer

from headgate.cli.console import err, out
from headgate.cli.targets import open_target
from headgate.errors import ConfigError
from headgate.evaluation.generation import Generation, chat_ids
from headgate.evaluation.generation import generate as generate_batch


def generate(
    target: Annotated[
        str, typer.Argument(help="A run directory, a checkpoint, or a model name.", show_default=False)
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue (repeatable).")
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", help="Read prompts from the terminal; an empty line starts afresh."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template, even where the model has one.")
    ] = False,
    removed: Annotated[bool, typer.Option("--removed", help="Detach the methods first.")] = False,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on a bare model.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    allow_partial: Annotated[bool, typer.Option()] = False,
) -> None:
    """Continue prompts with routing live (or --removed)."""
    if not prompt and not interactive:
        raise ConfigError("nothing to do: give --prompt TEXT or --interactive")
    model, tokenizer, _ = open_target(target, device=device, allow_partial=allow_partial, adapter=adapter)
    if removed and hasattr(model, "headgate_methods"):
        model.headgate_methods.detach()
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, do_sample=sample, temperature=temperature, top_p=top_p, seed=seed
    )
    asked = [chat_ids(tokenizer, [{"role": "user", "content": text}], raw=raw) for text in prompt or []]
    if stream:
        for ids in asked:
            note(stream_one(model, tokenizer, ids, options))
    elif asked:
        for result in generate_batch(model, tokenizer, asked, batch_size=batch_size, **options):
            out.print(result.text, markup=False)
            note(result)
    if interactive:
        converse(model, tokenizer, options, raw=raw)


def converse(model: Any, tokenizer: Any, options: dict[str, Any], *, raw: bool) -> None:
    """A conversation where the model has a chat template, one prompt after the other where it has none."""
    keeps = not raw and getattr(tokenizer, "chat_template", None) is not None
    turns: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip() or not keeps:
            turns = []
        if not text.strip():
            continue
        turns.append({"role": "user", "content": text})
        answer = stream_one(model, tokenizer, chat_ids(tokenizer, turns, raw=raw), options)
        note(answer)
        turns.append({"role": "assistant", "content": answer.text})


def stream_one(model: Any, tokenizer: Any, ids: list[int], options: dict[str, Any]) -> Generation:
    """Print one continuation token by token; the same tokens as without streaming."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (result,) = generate_batch(model, tokenizer, [ids], streamer=streamer, **options)
    return result


def note(result: Generation) -> None:
    if result.prompt_truncated:
        err.print("[yellow](the prompt fills the context: its beginning was left out)[/yellow]")
    if result.truncated:
        err.print("[yellow](stopped at the token limit)[/yellow]")
