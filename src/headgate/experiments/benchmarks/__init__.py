"""Benchmarks: one file each, all on the same frame (arms interleaved in one process, ratios, checks)."""
