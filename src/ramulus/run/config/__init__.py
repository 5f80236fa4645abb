"""What a run is: the recipe's dataclasses, overrides from the command line, the saved configuration, and how it is found and resumed."""
