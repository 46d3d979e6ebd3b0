"""Listening sockets of a server, bound before a model is loaded."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from neounify.errors import NeounifyError


class AddressError(NeounifyError, OSError):
    """The server cannot listen at an address."""


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets at every address of a host, bound but not listening yet. Raises AddressError.

    Clients cannot connect before the server listens, and no other server can take the port.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(one) for one in _bind_all(host, port)]


def _bind_all(host: str, port: int) -> Iterator[socket.socket]:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise AddressError(f"{host!r} is no address of this machine: {error}") from error
    for family, kind, protocol, _, address in dict.fromkeys(addresses):
        yield _bind(socket.socket(family, kind, protocol), address)


def _bind(one: socket.socket, address: tuple[object, ...]) -> socket.socket:
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if one.family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError as error:
        one.close()
        where = f"{address[0]} port {address[1]}"
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"{where} is in use, perhaps by another server; choose another with --port"
            ) from error
        raise AddressError(f"cannot listen at {where}: {error.strerror}") from error
    return one
