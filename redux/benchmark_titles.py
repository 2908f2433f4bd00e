"""Titles of the benchmarks by name, apart from `redux.benchmarks`, which takes a second to import: help needs them."""

BENCHMARK_TITLES = {"vqav2": "VQAv2", "gqa": "GQA", "textvqa": "TextVQA", "mme": "MME", "mmbench": "MMBench"}
"""Title of each benchmark on pages, by its name in job files."""
