"""What everything else stands on: the task, the tree of its responses, and where a run keeps them.

A `Task` is a prompt as token ids, its text, and what a reward needs to judge an answer (`task.py`); a `Tree` holds every path that was grown
for it in one visit, and a `Node` is a run of tokens with one author (`tree.py`). `store.py` writes trees losslessly, a line each, and reads
older formats; `tagged_json.py` does so for any value, and `json_object.py` reads what else is JSON. `run_folder.py` says what lies where in the
folder of a run, `checksums.py` whether it is whole, `new_folder.py` writes a folder whole or not at all, and `text.py` says where a boxed answer is
complete. Only the standard library is imported here.
"""
