"""The model that learns: its log-probs on packed trees, gradients and optimizer steps, adapters, a value head, and attention influence."""
