"""A model put to the test: problems sampled in chunks that survive a kill, answers at rest, and results as tables."""
