"""Where tokens come from: prefixes in, tokens out, never trees.

`engine.py` is the protocol, and all that other rooms know. `toy.py` is a seeded table model in plain Python. `local/` samples from a
transformers model in this process by continuous batching over KV that is shared along prefixes.
"""
