"""Attention along trees: a token sees its own path only, so a packed tree has the gradient of its separate sequences.

`tree_attention.py` is what transformers calls, and chooses the way: on a CPU the compiled kernels of `kernels.py`, or SDPA over the unbranched
runs of `runs.py` where there are none; on a GPU flex attention; a dense mask anywhere.
"""
