"""An engine in another process: `client.py` is an Engine that asks over HTTP, `server.py` puts any engine behind it.

`wire.py` is all that both know: what travels, as versioned JSON. A client for another kind of server (vLLM, say) is one more client file; nothing
outside this folder changes.
"""
