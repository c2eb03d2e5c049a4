"""What the servers of this project share: a socket to listen on, and which addresses are this
machine's own.
"""

import contextlib
import ipaddress
import socket

from rlhf.errors import UserError


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def local_url(host: str, port: int, scheme: str = "http") -> str:
    """Return the address of a server as a URL without a path."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UserError where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        # a restart must not wait for the old connections to time out
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)
    except OSError as error:
        raise UserError(
            f"{host} port {port}: cannot listen there ({error.strerror}); choose another --port"
        ) from None
    return listener
