"""From credited trees to rows that can be learned from, and back.

`weights.py` says, once a step, which leaves are trained and what each token of theirs weighs; `fold.py` sums weights and credit down the tree;
`pack.py` puts both on rows within a budget of tokens. `annotate.py` writes credit and ratios into the trees, for whoever reads them later.
"""
