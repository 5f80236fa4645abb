"""The machine: one frozen Run is the configuration, one loop runs it, and a killed run goes on bit for bit.

`config` says what a run is and how it is changed and resumed; `stage.py` builds its parts, `trainer.py` is the loop, `rollouts.py` grows its
trees. `evaluation` measures models, `sweep` runs many recipes and seeds.
"""
