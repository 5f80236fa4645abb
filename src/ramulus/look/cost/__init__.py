"""What a run cost: every token and second by what became of it."""
