"""Recipes times seeds, each an ordinary run in a process of its own.

`sweep.py` is `ramulus sweep`: it plans the jobs and knows which are done. `job_pool.py` starts and watches their processes, as many at once as
allowed, and stops them so that each saves.
"""
