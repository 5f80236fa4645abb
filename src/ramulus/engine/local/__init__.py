"""The engine that samples in this process, on a CPU or one GPU, from the learner's own weights.

`local_engine.py` takes requests and answers them; the rest are its parts: who waits and who runs, slots and their keys and values, the prefix
cache, forward passes (compiled kernels, fused torch, or the model's own) and the draw. Other rooms import `factory.py` alone, with
the `Local` of a recipe; users may build a `LocalEngine`, which `ramulus` exports.
"""
