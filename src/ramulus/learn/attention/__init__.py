"""Attention along trees, where a token sees its own path: compiled kernels, flex attention on a GPU, or a dense mask."""
