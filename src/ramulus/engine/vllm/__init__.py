"""vLLM as an engine: servers in processes of their own, asked over HTTP; nothing of vLLM is imported here.

`factory.py` is what a recipe says, `vllm_engine.py` the Engine, `server.py` one server and how it is reached, `process.py` one that the run starts
itself, `transfer.py` sends weights without files, `wire.py` is what travels. What runs inside the servers is the package in `vllm-plugin/`.
"""
