"""Trees become gradients, by one formula: mask x 1/reference x advantage x likelihood gradient (arXiv 2509.04419).

`batch` has the columns of a row of trees, `advantage` credits paths, `objective` is the formula with its masks, references and gates, `packing`
folds credit onto rows, `attention` attends along trees, `policy` is the model that learns, and `sharded` is that model over many processes. Each
imports only those named before it. What is asked of a learner is `policy/learner.py`; the formula itself is `objective/estimator.py`.
"""
