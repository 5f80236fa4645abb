"""Benchmarks: one command a question; figures are recorded in RESULTS.md."""

from ramulus.native.memory import ask_for_large_pages

ask_for_large_pages()  # as the command does, before torch allocates
