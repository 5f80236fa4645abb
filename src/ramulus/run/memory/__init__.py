"""Memory: what a step takes by part, what fits into what is free, and what fits on several GPUs."""
