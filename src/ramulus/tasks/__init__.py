"""What to solve: problems, where they come from, and what a solution is worth."""
