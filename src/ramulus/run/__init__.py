"""The machine: one Run is the configuration, one loop runs it, and a killed run goes on bit for bit."""
