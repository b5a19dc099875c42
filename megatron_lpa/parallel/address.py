"""Where rank 0 is: ``MASTER_ADDR`` and ``MASTER_PORT``, as launchers set them; and a port that is free here.

    python -m megatron_lpa.parallel.address [PORT]

prints a free port of this machine: the given one if it is free. ``slurm/common.sh`` asks for one at each
start.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import sys
from collections.abc import Sequence

from megatron_lpa.command_line import command, run_tool
from megatron_lpa.errors import UserError

logger = logging.getLogger("megatron_lpa.parallel.address")  # not __name__: it is run with -m

PORTS = range(10_000, 30_000)
"""What is chosen from: below the ports that systems hand out by themselves, and those of most services."""


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
    return host, _port_of(port)


def _port_of(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:9]) < 1 << 16:
        raise UserError(f"MASTER_PORT is {text[:40]!r}, but must be a number from 1 to 65535")
    return int(text)


def listener_at(port: int, local: bool) -> socket.socket:
    """A socket that listens on this machine.

    Args:
        port: where.
        local: to this machine's own processes only, else to all that reach it.

    Raises:
        OSError: the port is taken, or not for this user.
    """
    dual = socket.has_dualstack_ipv6() and not local
    return socket.create_server(
        ("127.0.0.1" if local else "", port),
        family=socket.AF_INET6 if dual else socket.AF_INET,
        backlog=4096,
        dualstack_ipv6=dual,
    )


def free_port() -> int:
    """A port that nothing listens at on this machine, at this moment; another one each time.

    Raises:
        UserError: there seems to be none.
    """
    for port in random.SystemRandom().sample(PORTS, 200):
        try:
            listener_at(port, local=False).close()
        except OSError:
            continue
        return port
    raise UserError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on this machine")


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


@command()
def main(argv: Sequence[str]) -> int:
    """Print a free port; 0."""
    port = _port_of(argv[0]) if argv else free_port()
    try:
        listener_at(port, local=False).close()
    except OSError as error:
        logger.info(f"note: port {port} cannot be used on {socket.gethostname()}: {error.strerror}")
        port = free_port()
    print(port)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
