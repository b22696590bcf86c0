"""Where ranks meet: on the interface that leads to MASTER_ADDR, and on no other.

torch's store, gloo and NCCL have no authentication, and torch's store listens on every interface
unless it is handed a socket. In: MASTER_ADDR and MASTER_PORT. Out: a store that listens there
alone, and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where the user has set neither.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from resnet_dist.config.schema import ConfigError


def meet(rank: int, size: int, timeout: timedelta) -> Any:
    """The ranks' store: rank 0's, or the one that torchrun's agent keeps. Collective.

    Raises: ConfigError where the environment does not say where; OSError where the port is taken.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise ConfigError(f"MASTER_ADDR = {host!r}, MASTER_PORT = {port!r}: name the address and "
                          "port where ranks meet; the launcher sets them")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agents = dist.TCPStore(host, int(port), size, False, timeout)  # type: ignore[attr-defined]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"/resnet_dist/{attempt}", agents)  # type: ignore[attr-defined]
    name = interface(own_address(host, int(port)))
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    listener = None
    if rank == 0:
        listener = socket.create_server((host, int(port)), backlog=max(128, 2 * size))
    return dist.TCPStore(host, int(port), size, rank == 0, timeout,  # type: ignore[attr-defined]
                         wait_for_workers=False,
                         master_listen_fd=None if listener is None else listener.detach())


def own_address(host: str, port: int) -> str:
    """This machine's address on the way to `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return str(probe.getsockname()[0])


def interface(address: str) -> str | None:
    """The network interface that has `address`."""
    for name, facts in psutil.net_if_addrs().items():
        if any(fact.address == address for fact in facts):
            return name
    return None
