"""Trees get taller: where to branch, when to stop, what to prune, and how many prompts come next.

A branching rule maps a tree to buds (`branching.py`; TreePO's is `segments.py`, AttnRL's and TreeRL's are in `forks.py`), `growth.py` turns buds
into requests and segments into nodes, and `grading.py` asks the rewards. `stop.py` ends a text, `pruning.py` and `worth.py` end paths early, and
`schedule.py` and `adaptive.py` say how many prompts a step draws. Rules are pure functions of the tree, so that any of them combines with any
other. There is no torch here.
"""
