"""torch.compile by parts: attention and MLP of every block, where nearly all of the time is.

Methods decide in Python between these parts (which blocks run, what a gate stops, what a bank adds), so a graph of the whole
model would break at each of them, and change when a method comes or goes. The parts have no such decisions inside, and
equal blocks share one graph. Modules, their names and their hooks stay as they are.
"""

from __future__ import annotations

import os
import shutil

from torch import nn

from headgate.errors import ConfigError
from headgate.models.anatomy import describe


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
    for block in anatomy.blocks:
        for part in (anatomy.attention(block), anatomy.mlp(block)):
            part.compile(backend=backend, dynamic=True)
