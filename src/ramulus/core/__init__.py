"""What everything else stands on: the task, the tree of its responses, and trees as JSON lines.

A `Task` is a prompt as token ids, its text, and what a reward needs to judge an answer. A `Tree` holds every path that was grown for a task
in one visit; a `Node` is a run of tokens with one author and one fate. `store.py` writes trees losslessly, a line each, and reads older formats.
Only the standard library is imported here, and torch never.
"""
