"""Trees to look at: in the browser, in a terminal, in a notebook, and as pictures.

`viewer.py` serves the page in `assets/`, whose questions `api.py` answers in JSON; `page.py` writes page and answers as one file. `runs.py` finds
what there is to show, `files.py` reads files that still grow, and `tree_json.py`, `reports.py` and `text.py` say what of them is shown.
`show.py` draws trees for a terminal and, as `ramulus.show()`, for a notebook, with the SVG of `picture.py`.
"""
