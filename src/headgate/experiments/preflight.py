"""What of a recipe cannot work on this machine, asked before a model is loaded: packages, device, files, metrics."""

from __future__ import annotations

import difflib
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

from headgate.errors import ConfigError, ModelError
from headgate.experiments.metric import validation_losses
from headgate.experiments.recipe import Recipe
from headgate.models.places import check_place

NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "tensorboard": (("tensorboard", "tensorboardX"), "pip install 'headgate[track]'"),
    "trackio": (("trackio",), "pip install 'headgate[track]'"),
    "wandb": (("wandb",), "pip install 'headgate[track]'"),
    "flash_attention_2": (("flash_attn", "kernels"), "pip install kernels (or flash-attn), on a GPU"),
    "flash_attention_3": (
        ("flash_attn_interface", "flash_attn_3", "kernels"),
        "pip install kernels, on a GPU",
    ),
    "flash_attention_4": (("flash_attn", "kernels"), "pip install kernels, on a GPU"),
    "bitsandbytes": (("bitsandbytes",), "pip install 'headgate[cuda]'"),
    "lm_eval": (("lm_eval",), "pip install 'headgate[lm-eval]'"),
}
"""What a setting asks for -> the modules of which one is enough, and the line that installs it."""


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError or ModelError, with the place, the value and the cure, for what this machine cannot run."""
    if recipe.entry is not None:
        from headgate.experiments.entry import check_entry

        check_entry(recipe)
    check_packages(recipe)
    check_place(recipe.model.name_or_path)
    check_early_stopping(recipe)
    check_routing(recipe)
    check_parallel(recipe)
    if recipe.lora is not None and recipe.lora.peft_type.lower() != "lora":
        from headgate.models.adapters import other_config

        other_config(recipe.lora)
    if recipe.model.adapter is not None:
        from headgate.models.adapters import check_adapter

        check_adapter(recipe.model.adapter)
    if recipe.model.device != "auto" or recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        check_device(recipe)
    if recipe.data.chat_template is not None:
        check_chat_template(recipe.data.chat_template)
    check_output(Path(recipe.output_dir))


def check_packages(recipe: Recipe) -> None:
    """Every optional package that the recipe asks for is installed. Raises ConfigError with its pip line."""
    asked = [("report_to", name, name) for name in recipe.report_to if name in NEEDS]
    attention = recipe.model.attn_implementation
    if attention in NEEDS:
        asked.append(("model.attn_implementation", attention, attention))
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(recipe.model, key):
            asked.append((f"model.{key}", "true", "bitsandbytes"))
    if recipe.evaluation:
        from headgate.evaluation.checks import KNOWN

        asked += [
            (f"evaluation.{index}.task", task.task, "lm_eval")
            for index, task in enumerate(recipe.evaluation)
            if task.task not in KNOWN
        ]
    for place, value, need in asked:
        modules, cure = NEEDS[need]
        if not any(_installed(module) for module in modules):
            raise ConfigError(f"{place}={value} needs {modules[0]}, which is not installed: {cure}")


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def check_early_stopping(recipe: Recipe) -> None:
    """Early stopping watches a figure that the run's validations log. Raises ConfigError."""
    stopping = recipe.training.early_stopping
    if stopping is None:
        return
    losses = validation_losses(recipe)
    if not losses:
        raise ConfigError(
            "training.early_stopping watches validation, and data.validation is null: give it rows, or leave "
            "early_stopping out"
        )
    known = [*losses, *(name.removesuffix("loss") + "accuracy" for name in losses)]
    if stopping.metric not in known:
        close = difflib.get_close_matches(stopping.metric, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise ConfigError(f"training.early_stopping.metric={stopping.metric}: no validation logs it: {hint}")


def check_routing(recipe: Recipe) -> None:
    """An evaluation that sets a routing needs a method to route. Raises ConfigError."""
    for index, task in enumerate(recipe.evaluation):
        if task.routing is not None and not recipe.methods:
            raise ConfigError(
                f"evaluation.{index}.routing={task.routing}: this recipe has no method to route: leave it out"
            )


def check_parallel(recipe: Recipe) -> None:
    """A base spread over ranks is frozen, and what is on it reads no weight of its own. Raises ConfigError."""
    parallel, lora = recipe.model.parallel, recipe.lora
    if parallel is None or parallel.ranks == 1:
        return
    where = f"model.parallel={parallel.told}"
    if lora is None and recipe.model.adapter is None:
        from headgate.methods.registry import build_stack

        if not build_stack(recipe.methods, recipe.seed).brings_adapter:
            raise ConfigError(
                f"{where} spreads a frozen base, and lora: null trains the base itself: set lora, use lora_experts, or "
                "leave model.parallel out (every rank then holds all weights)"
            )
    kind = None if lora is None or recipe.model.adapter is not None else lora.peft_type
    if kind not in (None, "lora") or (lora is not None and lora.use_dora):
        key = "lora.use_dora=true" if lora is not None and lora.use_dora else f"lora.peft_type={kind}"
        raise ConfigError(
            f"{where} and {key}: only plain LoRA is known not to read the weights it adapts, which are spread over ranks: "
            "use plain LoRA, or leave model.parallel out"
        )


def check_device(recipe: Recipe) -> None:
    """The device is here, and can do what is asked of it. Raises ModelError."""
    from headgate.models.devices import choose_device

    model, device = recipe.model, choose_device(recipe.model.device)
    if (model.load_in_4bit or model.load_in_8bit) and device.type != "cuda":
        key = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        raise ModelError(
            f"model.{key}=true needs CUDA, this device is {device.type}: remove the key or run on a GPU"
        )


def check_chat_template(text: str) -> None:
    """Raise ConfigError for text that is no Jinja template."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # transformers' own tag
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        raise ConfigError(f"data.chat_template, line {error.lineno}: {error.message}") from None


def check_output(folder: Path) -> None:
    """Runs can be written below ``folder``. Raises ConfigError naming what is in the way."""
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"output_dir={folder}: {nearest} is a file, not a folder: choose another")
    # permissions say little to root, or of a read-only file system
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(
            f"output_dir={folder}: nothing can be written in {nearest} ({error.strerror}): choose another"
        ) from None
