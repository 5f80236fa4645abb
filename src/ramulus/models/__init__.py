"""How transformers' models attend, said once for engine and learner: which earlier tokens a layer sees, and what it does to the scores."""
