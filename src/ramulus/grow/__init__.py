"""Trees get taller: where to branch, when to stop, what to prune, and how many prompts come next.

A branching rule maps a tree to buds, `growth.py` turns buds into requests and segments into nodes, and `grading.py` asks the rewards.
Rules are pure functions of the tree, so that any of them combines with any other. There is no torch here.
"""
