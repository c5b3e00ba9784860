"""A watch on the network: every attempt to reach one, or to be reached, is an error that nothing can hide."""

import contextlib
import os
import socket
import sys

NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
SENDING = ("socket.sendto", "socket.sendmsg", "urllib.Request", "http.client.connect", "ftplib.connect")

attempts: list[str] = []
"""The attempts so far, in words."""


def watch() -> None:
    """Has Python tell of attempts from here on, also of those that a library hides; it cannot be undone."""

    def heard(event: str, arguments: tuple[object, ...]) -> None:
        if event in NETWORK or event in SENDING:
            attempts.append(f"{event} {arguments}")
            raise ConnectionRefusedError(f"the network is not to be used: {event}")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.pop(name, None)  # the package has to see to it by itself
    sys.addaudithook(heard)


def require_silence() -> None:
    """Fails if there was an attempt, and if one of its own is not noticed."""
    assert not attempts, attempts
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("localhost", 9))
    assert attempts, "the watch has fallen asleep"
