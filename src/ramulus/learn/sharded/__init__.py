"""A learner over many processes: FSDP2 shards weights, gradients and optimizer over ranks, and rank 0 tells the others what to do.

`factory.py` is what a recipe says, `sharded_learner.py` the learner of rank 0, `sharded_policy.py` the policy that every rank has. `world.py` is
how ranks find each other and are told what to do (`calls.py`), `share.py` cuts a step's rows between them, `placing.py` gives each its shard,
`checkpoints.py` writes the shards.
"""
