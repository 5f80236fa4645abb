"""The machine: one frozen Run is the configuration, one loop runs it, and a killed run goes on bit for bit.

`launch.py` is `ramulus train` and `from_python.py` the same from Python; `stage.py` builds a stage's parts, `trainer.py` is the loop,
`rollouts.py` grows its trees, `checkpoint.py` is what a resume needs. `config/` says what a run is and how it is changed and resumed, `memory/` what
a step takes and what fits, `evaluation/` measures models, `sweep/` runs many recipes and seeds. `cluster.py`, the one module that imports ray,
places samplers (`placed_engine.py`, `sampler.py`) and ranks (`placed_ranks.py`) on other machines.
"""
