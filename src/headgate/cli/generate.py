"""``headgate generate RUN --prompt ...``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from transformers import TextStreamer

from headgate.cli.console import err, out
from headgate.cli.targets import open_target
from headgate.errors import ConfigError
from headgate.evaluation.generation import generate as generate_batch


def generate(
    target: Annotated[
        str, typer.Argument(help="A run directory, a checkpoint, or a model name.", show_default=False)
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue (repeatable).")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Read prompts from the terminal.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option()] = 256,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template, even where the model has one.")
    ] = False,
    removed: Annotated[bool, typer.Option("--removed", help="Detach the methods first.")] = False,
    device: Annotated[str, typer.Option()] = "auto",
    allow_partial: Annotated[bool, typer.Option()] = False,
) -> None:
    """Continue prompts with routing live (or --removed)."""
    if not prompt and not interactive:
        raise ConfigError("nothing to do: give --prompt TEXT or --interactive")
    model, tokenizer, _ = open_target(target, device=device, allow_partial=allow_partial)
    if removed and hasattr(model, "headgate_methods"):
        model.headgate_methods.detach()
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, do_sample=sample, temperature=temperature, top_p=top_p, seed=seed
    )

    def answer(texts: list[str]) -> None:
        wrapped = [text if raw else chat(tokenizer, text) for text in texts]
        if stream or interactive:
            for text in wrapped:
                stream_one(model, tokenizer, text, options)
            return
        for result in generate_batch(model, tokenizer, wrapped, **options):
            out.print(result.text, markup=False)
            if result.truncated:
                err.print("[yellow](stopped at the token limit)[/yellow]")

    if prompt:
        answer(prompt)
    while interactive:
        try:
            answer([input("> ")])
        except EOFError:
            return


def chat(tokenizer: Any, text: str) -> str:
    """The prompt inside the model's chat template, where it has one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return text
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    )


def stream_one(model: Any, tokenizer: Any, text: str, options: dict[str, Any]) -> None:
    """Print one continuation token by token."""
    import torch

    inputs = tokenizer(text, return_tensors="pt").to(next(model.parameters()).device)
    inputs.pop("token_type_ids", None)
    torch.manual_seed(options["seed"])
    sampling = (
        {"do_sample": True, "temperature": options["temperature"], "top_p": options["top_p"], "top_k": 0}
        if options["do_sample"]
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    model.generate(
        **inputs,
        max_new_tokens=options["max_new_tokens"],
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
