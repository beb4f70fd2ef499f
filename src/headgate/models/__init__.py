"""Floor 2: the only code that knows the internals of transformers and PEFT."""
