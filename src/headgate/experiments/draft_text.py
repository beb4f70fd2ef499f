"""A drafted recipe as a user would write it: YAML with a comment wherever something was chosen for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from headgate.experiments.records import Content


def commented(content: Content, notes: Sequence[str], own_validation: bool, lengths: str) -> str:
    """The recipe as YAML with a comment wherever something was chosen for the user."""
    data, training, compare = content["data"], content["training"], content["compare"]
    steps = "epochs" if "epochs" in training else "max_steps"
    held = (
        "the folder's own validation split"
        if own_validation
        else (
            f"{data['validation'].get('options', {}).get('validation_share', 0.05):.0%} of the rows, chosen by a hash of each, are held out"
        )
    )
    arms = "\n".join(f"    {name}: {_flow(arm)}" for name, arm in compare["arms"].items())
    template = (
        f"  chat_template: {_flow(data['chat_template'])}   # the model has none: roles as words\n"
        if "chat_template" in data
        else ""
    )
    return f"""\
# Drafted by `headgate init` from {data["train"]["path"]}: {"; ".join(notes)}.
#   headgate data RECIPE       rows as they are trained, masked tokens dim
#   headgate train RECIPE      one run: LoRA alone, until methods are named
#   headgate compare RECIPE    every arm below at every seed, with the verdict
# All keys: docs/recipes.md, `headgate schema`.
name: {content["name"]}
model: {_flow(content["model"])}
lora: {_flow(content["lora"])}
data:
  train: {_flow(data["train"])}
  validation: {_flow(data["validation"])}   # {held}
  max_length: {data["max_length"]}   # {lengths}
  loss_on: {data["loss_on"]}   # completion: what is asked is read and not trained on; all: every token is
  long_prompts: drop   # a row whose prompt alone fills max_length is left out and counted
{template}training:
  {steps}: {training[steps]}
  per_device_train_batch_size: {training["per_device_train_batch_size"]}
  learning_rate: {training["learning_rate"]:g}   # tune it for every arm alike: compare.tune, docs/experiments.md
evaluation:
  - {_flow(content["evaluation"][0])}   # the same rows, for the model before training too
compare:
  seeds: {compare["seeds"]}   # three are the least that carry an interval; five see smaller differences
  baseline: lora
  metric: {compare["metric"]}   # loss on those rows; name an evaluation with answers to compare scores
  arms:
{arms}
"""


def _flow(value: object) -> str:
    """A value as one line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    if (
        isinstance(value, str)
        and value.replace("_", "").replace("-", "").isalnum()
        and not value[0].isdigit()
        and value not in ("null", "true", "false", "yes", "no", "on", "off")
    ):
        return value
    return json.dumps(value, ensure_ascii=False)
