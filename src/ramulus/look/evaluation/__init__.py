"""What a model can do: samples on tasks, accuracy by several measures with intervals, and two models problem by problem."""
