"""Other libraries, each in an environment of its own and reached through a worker process."""
