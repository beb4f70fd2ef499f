"""Who must keep every law and protocol: Headgate's methods and baselines, and the package beside it."""

NAMES = [
    "layer_routing",
    "schema_bank",
    "lora_experts",
    "backward_gate",
    "ewc",
    "agem",
    "derpp",
    "lwf",
    "lisa",
]
