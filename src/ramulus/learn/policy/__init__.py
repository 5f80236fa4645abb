"""The model that learns: its log-probs on packed trees, gradients, optimizer steps, weights.

`learner.py` is the protocol that a run knows; `in_process.py` and `separate.py` are learners in this process and in another one, built by
`torch_learner.py`. `torch_policy.py` does their work, with `head.py` for log-probs, `value_head.py` for PPO's critic, `lora.py` for adapters,
`scoring.py` for whole forests and `influence.py` for attention influence; `kept.py` measures what its passes keep. `model.py` says where a model
comes from, `loading.py` and `writing.py` read and write it; `fused_layers.py` and `half*.py` make its layers faster on a CPU.
"""
