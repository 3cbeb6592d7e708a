"""What systemd is told, and what it hands over; nothing where there is no systemd.

Reference: sd_notify(3) and sd_listen_fds(3)
"""

from __future__ import annotations

import os
import socket
import time

__all__ = ["inherited", "notify", "reloading", "watchdog_seconds"]

FIRST_DESCRIPTOR = 3


def notify(*state: str) -> None:
    """Send assignments such as "READY=1" to the service manager, where one listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address or not hasattr(socket, "AF_UNIX"):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.setblocking(False)
            manager.sendto("\n".join(state).encode(), address)
    except OSError:
        pass  # a manager that does not listen is no reason to stop


def reloading() -> None:
    """Say that a reload begins; "READY=1" ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_seconds() -> float | None:
    """How often "WATCHDOG=1" is expected, halved to be on the safe side; None for never."""
    pid, period = os.environ.get("WATCHDOG_PID"), os.environ.get("WATCHDOG_USEC", "")
    if not period.isdigit() or pid not in (None, str(os.getpid())):
        return None
    return int(period) / 2e6


def inherited() -> socket.socket | None:
    """The listening socket that the service manager made; None where it made none."""
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    if not mine or os.environ.get("LISTEN_FDS") in (None, "0"):
        return None
    return socket.socket(fileno=FIRST_DESCRIPTOR)
