"""What a run is, and how it is found, changed, saved and resumed.

`recipe.py` has Run, the dataclass that is the whole configuration; `find.py` reads recipes, shipped or a user's own. `override.py` sets fields from
the command line, `yaml_file.py` from a file, with `words.py`, `values.py` and `short_names.py` for what a text stands for. `describe.py` writes a
configuration down, `parts.py` goes through what lies in one, and `resume.py` decides whether its run begins or goes on.
"""
