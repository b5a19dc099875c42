"""Where rank 0 is: ``MASTER_ADDR`` and ``MASTER_PORT``, as launchers set them."""

from __future__ import annotations

import os
import socket

from megatron_lpa.errors import UserError


def master_address() -> tuple[str, int]:
    """Host and port.

    Raises:
        UserError: the host is empty, or the port is missing or no number of a port.
    """
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT")
    if not host.strip():
        raise UserError("MASTER_ADDR is empty; set it to rank 0's address")
    if port is None:
        raise UserError("WORLD_SIZE is above 1 but MASTER_PORT is not set; start through a launcher")
    if not port.isdecimal() or not 0 < int(port[:9]) < 1 << 16:
        raise UserError(f"MASTER_PORT is {port[:40]!r}, but must be a number from 1 to 65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether all processes that meet there have to be of one machine."""
    return host in ("127.0.0.1", "localhost")


def loopback_interface() -> str | None:
    """Its name, as ``lo``; None where there is none."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def why_unknown(host: str, port: int) -> str:
    """Why this machine knows no such host; empty if it does."""
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return error.strerror or str(error)
    except UnicodeError as error:
        return str(error)
    return ""
