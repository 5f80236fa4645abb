"""What engine and learner must know of a transformers model, said once for both: how its layers attend, how far its positions reach.

`survey.py` asks a model in one pass over a few tokens, and `variant.py` says what it may answer: windows, chunks, soft caps, sinks. `positions.py`
has the most tokens of a text, `sizes.py` parameters and shapes without loading, `precision.py` computes half-precision models in float32 for a check.
`weights.py` says what weights are on their way from a learner to an engine.
"""
