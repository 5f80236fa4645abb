"""The tree itself, its task and its store; standard library only."""
