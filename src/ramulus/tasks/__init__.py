"""What to solve: problems, where they come from, and what a solution is worth.

A `Problem` is text with an answer; files, data sets and generators give problems, and a tokenizer makes them tasks. Rewards map a task and a
path to a number; whatever judges what a model wrote runs in worker processes that can be killed.
"""
