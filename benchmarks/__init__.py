"""Benchmarks: one command a question; figures are recorded in RESULTS.md."""
