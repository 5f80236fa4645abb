"""C kernels, and what compiles them on the user's machine at the first use.

`build.py` finds the compiler, keeps what it built in a cache folder, and says why where it can't; `prebuilt.py` takes kernels that came with a
wheel instead. `decode.c` and `draw.c` decode tokens; `attention.c` attends along trees, and `layers.c` computes what lies between the products
of a model's layers, both forward and backward. Every caller has a way in torch that gives the same results. `memory.py` says how much memory
this process may still take, and `blocks.cpp` keeps what tensors leave, by `blocks.py`.
"""
