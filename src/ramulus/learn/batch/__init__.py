"""A forest as columns: every shared node stands once on a row, in preorder.

`layout.py` says where each node and leaf stands, within a budget of tokens a row. `tree_batch.py` is the row that is learned from, with all that the
formula reads of it; `score_row.py` is the row that is only read, and the way of what was read back into the trees.
"""
