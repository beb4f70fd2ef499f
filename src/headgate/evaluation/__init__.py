"""Floor 5: generation, perplexity, exact match, code in a sandbox, lm-evaluation-harness."""
