"""Runs side by side over seeds, at equal steps, tokens and seconds.

`compare.py` reads the curves and computes means, intervals and paired differences; begin there. `tables.py` writes a `Comparison` as tables,
CSV, LaTeX and JSON, and `plots.py` draws it, which alone needs matplotlib.
"""
