"""What a model can do: samples on tasks, accuracy by several measures with intervals, and two models problem by problem.

`evaluate.py` samples and grades, and keeps every answer. `measures.py` makes of these rows one value a problem for each measure, by the
estimators and the bootstrap of `statistics.py`; `paired.py` compares two evaluations. `scoreboard.py` shows all of it as tables and CSV.
"""
