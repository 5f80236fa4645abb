"""A forest as columns: `layout.py` places nodes and leaves on a row in preorder, `tree_batch.py` holds what the formula reads of it."""
