"""What to solve: problems, where they come from, and what a solution is worth.

A `Problem` is text with an answer, and a tokenizer makes it a task (`problem.py`, `chat.py`). Problems come from files and data sets (`files.py`),
from reasoning-gym (`gym.py`) or from generators (`chain.py`, `sums.py`, `word_problems.py`). A reward maps a task and a path to a number: the plain
ones are in `rewards.py`, mathematics in `math.py`, by what `equality.py`, `forms.py` and `formula.py` read in an answer. Whatever judges at
length what a model wrote runs in worker processes that can be killed (`workers.py`, `sandbox.py`).
"""
