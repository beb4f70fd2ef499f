"""What baselines of continual learning share: they act on what the recipe trains, and have no part in the model."""

from __future__ import annotations

from torch import nn

from headgate.config import StrictConfig
from headgate.errors import ConfigError
from headgate.methods.base import Method
from headgate.models.anatomy import Anatomy


class ContinualBaseline(Method):
    """A method over the PEFT adapter, or with ``lora: null`` over the model.

    ``trained``: the tensors that the recipe trains besides methods; none in a model that is loaded to be used.
    """

    adapter_alone = True

    def __init__(self, config: StrictConfig | None = None, **options: object) -> None:
        super().__init__(config, **options)
        self.anatomy: Anatomy | None = None
        self.trained: list[nn.Parameter] = []

    def check_run(self, max_steps: int) -> None:
        if not self.trained:
            raise ConfigError(
                f"{self.name}: nothing trains that it could protect (lora: null, and another method, lora_experts say, is the "
                f"adapter): train a LoRA or the model, or leave {self.name} out"
            )

    def attach(self, anatomy: Anatomy) -> None:
        self.anatomy, self.trained = anatomy, [p for p in anatomy.model.parameters() if p.requires_grad]

    def detach(self) -> None:
        self.anatomy, self.trained = None, []

    @property
    def attached(self) -> bool:
        return self.anatomy is not None

    @property
    def size(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.trained)

    def require_fixed_head(self) -> None:
        """Raises ConfigError where what enters the head does not tell, later too, what the model said."""
        assert self.anatomy is not None
        head = self.anatomy.head
        if not isinstance(head, nn.Linear) or any(p.requires_grad for p in head.parameters()):
            raise ConfigError(
                f"{self.name} reads what enters the language-model head at two times, and here the head itself trains or is no "
                "plain linear: train a LoRA that leaves lm_head and the embeddings out"
            )
