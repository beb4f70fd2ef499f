"""Outside Headgate: routed models as plain `transformers` classes, and the one file that brings them along.

Importing this package registers `HeadgateConfig` and `HeadgateForCausalLM` with `AutoConfig` and
`AutoModelForCausalLM`: a folder that `headgate export --to transformers` wrote then loads without remote code.
"""

from headgate.serving.modeling import HeadgateConfig, HeadgateForCausalLM, register

register()

__all__ = ["HeadgateConfig", "HeadgateForCausalLM", "register"]
