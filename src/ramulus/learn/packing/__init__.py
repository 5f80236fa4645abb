"""Credited trees to rows: which leaves are trained with what weight, their credit folded down the tree, and written back into it."""
