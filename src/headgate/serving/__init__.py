"""Outside Headgate: routed models as plain `transformers` classes, and the one file that brings them along.

Importing this package registers `HeadgateConfig` and `HeadgateForCausalLM` with `AutoConfig` and
`AutoModelForCausalLM`: a folder that `headgate export --to transformers` wrote then loads without remote code.
"""

from pathlib import Path

from headgate.files import write_atomically
from headgate.serving.bundle import modeling_file
from headgate.serving.modeling import HeadgateConfig, HeadgateForCausalLM, register

MODELING = "modeling_headgate.py"


def write_modeling(folder: Path) -> None:
    """The one self-contained modeling file, into an exported folder."""
    write_atomically(folder / MODELING, modeling_file())


register()
HeadgateForCausalLM.beside = write_modeling

__all__ = ["MODELING", "HeadgateConfig", "HeadgateForCausalLM", "register", "write_modeling"]
