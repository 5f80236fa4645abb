"""The formula: the estimator with its masks, references and leaf weights, the mix of several, the gate between them, and gauges of all."""
