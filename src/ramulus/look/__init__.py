"""What a run did and what it cost: evaluation and the ledger."""
