"""torch.compile by parts: attention and MLP of every block, where nearly all of the time is.

Methods decide in Python between these parts (which blocks run, what a gate stops, what a bank adds), so a graph of the whole
model would break at each of them, and change when a method comes or goes. The parts have no such decisions inside, and
equal blocks share one graph. Modules, their names and their hooks stay as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache, wraps
from types import MethodType

import torch
import torch._dynamo
from torch import nn
from transformers.cache_utils import Cache

from headgate.errors import ConfigError
from headgate.models.anatomy import describe

GRAPHS = 64
"""Of one part, until torch.compile gives it up and runs it as it is."""


def compile_parts(model: nn.Module, backend: str) -> None:
    """Compile attention and MLP of every block of ``model``, in place, at their first call.

    ``backend``: of torch.compile. Sizes are dynamic: batches differ in length, and routed blocks in their number of tokens.

    Raises ConfigError where ``inductor`` has no C++ compiler to work with on a CPU.
    """
    anatomy = describe(model)
    if backend == "inductor" and next(model.parameters()).device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ConfigError(
                f"model.compile: inductor needs a C++ compiler on a CPU, and there is no {compiler!r}: install g++ (or set CXX), "
                "or leave model.compile out"
            )
    # a part's graphs differ by mode (training, reading), mask and which of its tensors train: stages come to more than 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in anatomy.blocks:
        for part in (anatomy.attention(block), anatomy.mlp(block)):
            if "forward" in vars(part):
                raise ConfigError(
                    f"model.compile: {type(part).__name__} runs by a forward that something else has put there (offloading, say): "
                    "leave model.compile out"
                )
            # bound anew, so that a deep copy of the model runs on the copy's weights
            part.forward = MethodType(_but_with_cache(type(part).forward, backend), part)


@cache
def _but_with_cache(plain: Callable[..., object], backend: str) -> Callable[..., object]:
    """A class's forward compiled, but plain while decoding: a graph would hold on to its own layer of the cache, one a block."""
    compiled = torch.compile(plain, backend=backend, dynamic=True)

    @wraps(plain)
    def forward(*args: object, **kwargs: object) -> object:
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return (plain if cached else compiled)(*args, **kwargs)

    return forward
