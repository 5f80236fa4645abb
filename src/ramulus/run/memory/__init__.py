"""What a step takes of memory, by part and phase, and what fits.

`step.py` computes it from the recipe (`work.py`) and the sizes of its model (`model.py`), without loading anything; what sampling takes is said by
the engine's factory (`engine/memory.py`). `rooms.py` says which processes share a machine or GPU, `auto.py` fills what is free there
(`tokens_per_batch=auto`). `report.py` is `ramulus plan`; `fleet.py`, `rates.py` and `fleet_report.py` are `ramulus plan --gpus`.
"""
