"""The formula and what goes into it: open `estimator.py` first, then `mix.py`, which sums several terms.

`mask.py`, `token_weight.py` and `entropy_signal.py` are masks, `reference.py` and `shaped_reference.py` what the likelihood gradient is divided by,
`leaf_weight.py` ratios of whole paths, `per_author.py` one part for rollouts beside another for demonstrations. `gate.py` chooses from whom a
question is learned, `kl.py` and `kl_cov.py` hold the policy back, and `gauges.py` measures it all beside the maths.
"""
