"""Trees get taller: where to branch, when to stop, what to prune, and how a forest grows at its own pace."""
