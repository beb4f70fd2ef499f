"""Attach and detach: every change to a model goes through here and comes back as a removable handle.

Layers are never wrapped in new modules: state-dict keys, hidden-state capture and activation checkpointing
stay as they were. transformers checkpoints a block's ``forward`` and not its ``__call__``, so hooks on a block
run once, outside the checkpoint, while hooks on modules inside a block run again when it is recomputed: what
they do must be a pure function of their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from torch import Tensor, nn

BlockOutput = Tensor | tuple[Tensor, ...]
"""What a decoder block returns: most a hidden state, some a tuple that starts with it."""
T = TypeVar("T")


class Handle(Protocol):
    """Something installed that can be taken out again."""

    def remove(self) -> None: ...


class _Restore:
    """Gives an instance attribute back: deletes the override, or restores an earlier one."""

    def __init__(self, owner: object, attribute: str, value: object) -> None:
        self._owner, self._attribute = owner, attribute
        self._had, self._old = attribute in vars(owner), vars(owner).get(attribute)
        object.__setattr__(owner, attribute, value)

    def remove(self) -> None:
        if self._had:
            object.__setattr__(self._owner, self._attribute, self._old)
        else:
            vars(self._owner).pop(self._attribute, None)


def hidden_of(output: BlockOutput) -> Tensor:
    """The hidden state in a block's output."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: BlockOutput, hidden: Tensor) -> BlockOutput:
    """The block's output with its hidden state replaced, in the shape it came in."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def on_block_output(block: nn.Module, transform: Callable[[Tensor], Tensor]) -> Handle:
    """``block(x) -> transform(block(x))``, for blocks that return a tensor or a tuple."""

    def hook(_module: nn.Module, _args: object, output: BlockOutput) -> BlockOutput:
        return with_hidden(output, transform(hidden_of(output)))

    return block.register_forward_hook(hook)


def on_block_input(block: nn.Module, observe: Callable[[Tensor], Tensor | None]) -> Handle:
    """See the hidden state that enters a block, and replace it where ``observe`` returns a tensor."""

    def hook(
        _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        hidden = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        replaced = observe(hidden)
        if replaced is None:
            return None
        if args:
            return (replaced, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replaced}

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def on_linear(linear: nn.Module, delta: Callable[[Tensor], Tensor | None]) -> Handle:
    """``linear(x) -> linear(x) + delta(x)``; quantised linears work, since only the output is touched."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = delta(args[0])
        return output if change is None else output + change.to(output.dtype)

    return linear.register_forward_hook(hook)


def on_input(module: nn.Module, observe: Callable[[Tensor], object]) -> Handle:
    """See the first positional input of a module (the head's input, the final norm's)."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        observe(args[0])

    return module.register_forward_pre_hook(hook)


def override_forward(module: nn.Module, make: Callable[[Callable[..., T]], Callable[..., T]]) -> Handle:
    """Replace the instance's ``forward`` by ``make(original_forward)``: keys and checkpointing stay."""
    return _Restore(module, "forward", make(module.forward))


def override_attribute(module: nn.Module, name: str, value: object) -> Handle:
    """Set an attribute of this instance; removed, the module has what it had before."""
    return _Restore(module, name, value)


@contextmanager
def head_bypassed(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the language-model head returns its input's first feature instead of logits.

    The chunked head loss reads the head's input and never wants ``[B, T, V]`` logits; this way the model is
    still called through whatever wraps it (PEFT, accelerate), only its head does no work. Yields a list that
    receives the head's input.
    """
    captured: list[Tensor] = []

    def make(_original: Callable[..., object]) -> Callable[..., object]:
        def forward(hidden: Tensor) -> Tensor:
            captured.append(hidden)
            return hidden[..., :1]

        return forward

    handle = override_forward(head, make)
    try:
        yield captured
    finally:
        handle.remove()


@contextmanager
def head_input_captured(head: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list that receives the head's input ``[B, T, H]`` of every forward inside the context."""
    captured: list[Tensor] = []
    handle = on_input(head, captured.append)
    try:
        yield captured
    finally:
        handle.remove()
