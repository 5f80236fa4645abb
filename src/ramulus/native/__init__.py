"""C kernels, and what compiles them on the user's machine at the first use.

`build.py` finds the compiler, keeps what it built in a cache folder, and says why where it can't; every caller has a way in torch that gives
the same results. `decode.c` and `draw.c` decode tokens, `attention.c` attends along trees, forward and backward.
"""
