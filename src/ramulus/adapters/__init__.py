"""Ramulus's trees and credit inside other libraries' trainers, for those who train elsewhere.

`trl.py` brings them into TRL's GRPOTrainer, and `verl.py` into verl, whose rollout servers `verl_engine.py` makes an engine. `exports.py` writes
the trees of a run as files of other trainers, and `command.py` is `ramulus export`; all of them take paths as rows from `flat.py`. Each module
imports its library where it is used, so none of them has to be installed.
"""
