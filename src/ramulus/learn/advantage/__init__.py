"""Credit: from graded trees to a value for each leaf, node or token, one file a family of methods.

`group.py` compares the paths of a tree (GRPO) and says what an Advantage is, `baselines.py` goes without a group's deviation, `subgroup.py` is
TreePO's, `global_local.py` TreeRL's and AttnRL's, `token_group.py` HAPO's, `entropy_advantage.py` changes credit token by token, `gae.py` is PPO's.
"""
