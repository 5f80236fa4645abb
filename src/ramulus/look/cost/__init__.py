"""What a run cost: every token and every second, by what became of it.

`ledger.py` counts the tokens of a forest while a run trains: each once by its source and once by its fate. `account.py` adds up the lines of
metrics that come of it, and `statement.py` shows the account of a run as tables, JSON and CSV (`ramulus ledger`).
"""
