"""A learner over many processes: FSDP2 shards weights, gradients and optimizer over ranks, and rank 0 tells the others what to do."""
