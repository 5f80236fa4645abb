"""Trees and runs become understanding: evaluation, comparison, costs, and the viewer.

`curves.py` reads what runs have written and `glossary.py` says what each metric means; `evaluation` measures a model, `compare` sets runs side by
side, `cost` accounts for tokens and seconds, `viewer` shows trees in a browser, a terminal or a notebook. `terminal.py` makes text of models
harmless, and `spreadsheet.py` writes every CSV. Nothing here changes a run.
"""
