"""Where processes meet that torch is to connect."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any


def store_on(host: str, seconds: float) -> tuple[int, Any]:
    """A store on an address of this machine: its port, and the store."""
    import torch.distributed as dist

    room = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port, limit = room.getsockname()[1], timedelta(seconds=seconds)
    store = dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=room.detach()
    )
    return port, store
