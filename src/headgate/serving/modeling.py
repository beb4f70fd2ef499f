"""A causal language model with its routing, as a `transformers` class of its own.

The base architecture is built by `transformers`; adapter and methods are put into it as they were in training. A model
type of its own, so that no loader takes the base's weights and leaves the routing out without a word.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from headgate.errors import ModelError
from headgate.models.alignment import align
from headgate.models.anatomy import describe
from headgate.models.private import attention_implementation, choose_attention
from headgate.serving.adapter import put_adapter
from headgate.serving.lossless import Drafting, lossless_decoding
from headgate.serving.methods import SERVED, Served, ServedRouting

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

    from headgate.methods.layer_routing.forward import RoutedForward

FORMAT = 1


class HeadgateConfig(PreTrainedConfig):
    """``text_config``: of the base architecture. ``headgate``: its adapter and methods, as JSON."""

    model_type = "headgate"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # transformers reads it from the class

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    headgate: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        super().__post_init__(**kwargs)


class HeadgateForCausalLM(PreTrainedModel, GenerationMixin):
    """The base model with adapter and methods; for inference. ``set_routing`` says how the methods act.

    Raises ModelError for a folder written by a later version.
    """

    config_class = HeadgateConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"methods", "lora_A", "lora_B"}  # noqa: RUF012
    _can_compile_fullgraph = False  # which blocks run is asked of the device
    beside: ClassVar[Callable[[Path], None] | None] = None
    """Writes the modeling file into a folder: set where Headgate is installed; a file that was loaded is copied anyway."""

    def __init__(self, config: HeadgateConfig, *args: object, **kwargs: object) -> None:
        told = config.headgate or {"format": FORMAT, "adapter": {}, "methods": {}}
        if told["format"] > FORMAT:
            raise ModelError(
                f"this folder has format {told['format']}, this file reads {FORMAT}: export it again"
            )
        if attention_implementation(config) is None:
            choose_attention(config, told.get("attn_implementation"))
        super().__init__(config, *args, **kwargs)
        self.base = AutoModelForCausalLM.from_config(config.text_config)
        put_adapter(self.base, told["adapter"])
        made = {name: kind(told["methods"][name]) for name, kind in SERVED.items() if name in told["methods"]}
        self.methods = nn.ModuleDict(made)
        anatomy = describe(self.base)
        for method in made.values():
            method.attach(anatomy)
        self._aligned = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> ModelOutput:
        """As the base model's. Raises ModelError in training mode."""
        if self.training:
            raise ModelError("an exported model is for inference: call model.eval(), and train with headgate")
        if not self._aligned:  # not before: weights are loaded after __init__, where no later hook is ours
            align(self)
            self._aligned = True
        output: ModelOutput = self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return output

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers', with the modeling file: the folder loads where this one did, and where Headgate is missing."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write = type(self).beside
        if write is not None and kwargs.get("is_main_process", True):
            write(Path(save_directory))

    def set_routing(self, routing: str) -> None:
        """``on``, ``removed``, or what one method knows (``expert:<skill>`` of lora_experts) and the others do not.

        Raises ConfigError where no method knows it.
        """
        errors = []
        for method in self.methods.values():
            assert isinstance(method, Served)
            try:
                method.set_routing(routing)
            except ValueError as error:
                errors.append(error)
        if len(errors) == len(self.methods):
            raise errors[0] if errors else ModelError("this model has no routing to set")

    @contextmanager
    def routed(self, routing: str | None) -> Iterator[None]:
        """Inside, ``set_routing(routing)``; afterwards as it was exported. None changes nothing."""
        try:
            if routing is not None:
                self.set_routing(routing)
            yield
        finally:
            if routing is not None:
                self.set_routing("on")

    def lossless(self, *args: Any, drafting: Drafting | None = None, **kwargs: Any) -> Tensor:
        """For ``generate(..., custom_generate=model.lossless)``: the routed model drafts, full depth decides.

        ``drafting`` counts what is drafted and kept. Raises ModelError for a model that routes no blocks.
        """
        return lossless_decoding(*args, routing=self.depth, drafting=drafting, **kwargs)

    @property
    def depth(self) -> RoutedForward | None:
        """The routed forward of layer_routing; None where no blocks are routed."""
        if "layer_routing" not in self.methods:
            return None
        routed = self.methods["layer_routing"]
        assert isinstance(routed, ServedRouting)
        return routed.forward_pass

    def prepare_inputs_for_generation(self, *args: object, **kwargs: object) -> object:
        return self.base.prepare_inputs_for_generation(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.base.get_input_embeddings()
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        found: nn.Module = self.base.get_output_embeddings()
        return found

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every weight is loaded; the base's own rule fills what its architecture computes (rotary frequencies)."""
        self.base._init_weights(module)


def register() -> None:
    """Let ``AutoConfig`` and ``AutoModelForCausalLM`` know these classes, so that no remote code is needed."""
    AutoConfig.register(HeadgateConfig.model_type, HeadgateConfig, exist_ok=True)
    AutoModelForCausalLM.register(HeadgateConfig, HeadgateForCausalLM, exist_ok=True)
