"""Where tokens come from: prefixes in, tokens out, never trees.

`engine.py` is the protocol, with Request, Segment and Sampling, and `factory.py` what a recipe's engine says before it is built: all that other
rooms know. `stops.py` checks a request and asks its stops; `toy.py` is a seeded table model without torch. `local/` samples from a transformers
model in this process, by continuous batching over KV that is shared along prefixes; `remote/` asks an engine in another process over HTTP, `vllm/`
asks servers of vLLM. `pool.py` is what engines over several samplers have in common: calls that travel together, samplers that fail and are mended,
and, with `pushed.py` and `weight_bytes.py`, new weights for all of them.
"""
