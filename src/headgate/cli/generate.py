"""``headgate generate RUN --prompt ...``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from transformers import TextStreamer

from headgate.cli.console import err, out
from headgate.cli.targets import open_target
from headgate.errors import ConfigError
from headgate.evaluation.generation import Decoding, Generation, chat_ids
from headgate.evaluation.generation import generate as generate_batch
from headgate.evaluation.tasks import routing as routed
from headgate.experiments.chosen import chooser_of
from headgate.methods.compose import methods_of
from headgate.methods.layer_routing.method import LayerRouting
from headgate.serving import HeadgateForCausalLM
from headgate.serving.chooser import choose
from headgate.serving.lossless import check_lossless, lossless_decoding

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROUTING_HELP = (
    "How methods act: on, removed; auto (an expert chosen by each prompt's text), expert:NAME, mixture:a=.5,b=.5 "
    "(lora_experts)."
)


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
    routing: Annotated[str | None, typer.Option(help=ROUTING_HELP)] = None,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless", help="Full depth's own text: the routed model drafts, full depth verifies."
        ),
    ] = False,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on a bare model.")] = None,
    device: Annotated[str, typer.Option()] = "auto",
    allow_partial: Annotated[bool, typer.Option()] = False,
) -> None:
    """Continue prompts with routing live, or as --routing says."""
    if not prompt and not interactive:
        raise ConfigError("nothing to do: give --prompt TEXT or --interactive")
    model, tokenizer, run = open_target(target, device=device, allow_partial=allow_partial, adapter=adapter)
    if removed and routing is not None:
        raise ConfigError(f"--removed and --routing {routing} say two things: give one of them")
    if removed:
        methods_of(model).detach()
    options = Decoding(
        max_new_tokens=max_new_tokens, do_sample=sample, temperature=temperature, top_p=top_p, seed=seed
    )
    if lossless:
        options["custom_generate"] = drafting_of(model)
        batch_size = 1
    texts = list(prompt or [])
    if routing == "auto":
        if interactive or not texts:
            raise ConfigError("--routing auto chooses an expert by a prompt's text: give --prompt")
        for text, how in zip(texts, choices(run or Path(target), model, texts), strict=True):
            err.print(f"({how})", markup=False)
            with routed(model, how):
                answer(model, tokenizer, [text], options, stream=stream, raw=raw, batch_size=batch_size)
        return
    with routed(model, routing):
        answer(model, tokenizer, texts, options, stream=stream, raw=raw, batch_size=batch_size)
        if interactive:
            converse(model, tokenizer, options, raw=raw)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    options: Decoding,
    *,
    stream: bool,
    raw: bool,
    batch_size: int,
) -> None:
    """Print the continuation of every text."""
    asked = [chat_ids(tokenizer, [{"role": "user", "content": text}], raw=raw) for text in texts]
    if stream:
        for ids in asked:
            note(stream_one(model, tokenizer, ids, options))
    elif asked:
        for result in generate_batch(model, tokenizer, asked, batch_size=batch_size, **options):
            out.print(result.text, markup=False)
            note(result)


def choices(run: Path, model: nn.Module, texts: list[str]) -> list[str]:
    """The routing of each text: the expert that the run's chooser gives it. Raises ConfigError where there is no choice."""
    able = methods_of(model).evaluation.exporting_experts()
    if not able:
        raise ConfigError("--routing auto chooses among the experts of lora_experts, and this model has none")
    _entries, loaded = chooser_of(run, able[0][1].experts.roster)
    if loaded is None:
        raise ConfigError(
            f"--routing auto: {run} was not trained on a stream of skills, whose texts would tell its experts apart: use "
            "--routing on, or expert:NUMBER"
        )
    return [f"expert:{choose(text, loaded).removeprefix('expert_')}" for text in texts]


def drafting_of(model: nn.Module) -> Callable[..., Tensor]:
    """The decoding method of --lossless. Raises ModelError for a model whose routing cannot draft."""
    if isinstance(model, HeadgateForCausalLM):
        routing = model.depth
    else:
        routing = next((one.execution for one in methods_of(model) if isinstance(one, LayerRouting)), None)
    check_lossless(routing)
    return partial(lossless_decoding, routing=routing)


def converse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, options: Decoding, *, raw: bool
) -> None:
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


def stream_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int], options: Decoding
) -> Generation:
    """Print one continuation token by token; the same tokens as without streaming."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    (result,) = generate_batch(model, tokenizer, [ids], streamer=streamer, **options)
    return result


def note(result: Generation) -> None:
    if result.prompt_truncated:
        err.print("[yellow](the prompt fills the context: its beginning was left out)[/yellow]")
    if result.truncated:
        err.print("[yellow](stopped at the token limit)[/yellow]")
