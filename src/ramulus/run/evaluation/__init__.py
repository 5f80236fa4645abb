"""A model put to the test: problems sampled in chunks that survive a kill, answers at rest, results as tables.

`commands.py` is `ramulus eval` and `ramulus rollout`; `evaluation.py` samples what `plan.py` says for the sets of `task_sets.py`, `answers.py`
keeps it on the disk, `results.py` makes the tables. `final_evaluation.py` measures a run before its first step and after its last,
`lm_eval_tasks.py` asks lm-evaluation-harness.
"""
