"""Whether a service can listen at an address, asked before anything starts."""

from __future__ import annotations

import socket

from pipelines.errors import UserError


def refuse_impossible(host: str, port: int) -> None:
    """Refuse what is no port, or a host that nobody knows.

    Raises:
        UserError: naming the port.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port: {port} is none; ports go from 0, which takes a free one, to 65535")
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--port: {port} of {host} cannot be used, there is no such address ({error})") from error


def free_port(host: str, port: int) -> int:
    """The port, or for 0 a free one.

    Ray Serve binds with SO_REUSEPORT and would share a taken port with a stranger, so ask first and without it.

    Raises:
        UserError: nothing can listen there, or something does already.
    """
    refuse_impossible(host, port)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return int(probe.getsockname()[1])
        except OSError as error:
            raise UserError(
                f"--port: {port} of {host} cannot be used ({error.strerror}); choose another, or 0 for a free one"
            ) from error
