"""Ray, started here or reached at an address, quiet, and let go at the end."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from anomalyd.detect.runtime import available_cpus
from anomalyd.errors import AnomalydError, MissingExtra, UsageError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["cluster", "reason", "require"]

REACH_SECONDS = 5.0
STORE_BYTES = 256 << 20  # of a cluster of our own: what travels is names and counts


def require() -> None:
    """Told before anything is read or planned.

    Raises:
        MissingExtra: Ray is not installed.
    """
    try:
        there = find_spec("ray") is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise MissingExtra("ray", "ray")


@contextmanager
def cluster(address: str | None = None) -> Iterator[ModuleType]:
    """Yields `ray`, connected; a cluster of our own ends with it, another one stays.

    Args:
        address: HOST:PORT of a cluster's head, ray://HOST:PORT, or "auto"; None takes
            RAY_ADDRESS, or starts Ray on this machine alone.

    Raises:
        MissingExtra: Ray is not installed.
        AnomalydError: nothing answers at the address, or Ray cannot start here.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    # Read when Ray is loaded: no statistics of use leave the machine, stderr is for our messages.
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    quiet["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    if address is None:
        quiet["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on loopback alone, on any system
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "ray", "ray") from None
    if address is not None:
        _reach(address)
    ours: dict[str, Any] = {}
    if address is None:
        ours = {
            "num_cpus": available_cpus(),
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        }
        if not os.access("/dev/shm", os.W_OK):
            ours["_plasma_directory"] = tempfile.gettempdir()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        with _silence():
            # "local" is a new one: without an address Ray would join any that runs here.
            ray.init(
                address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **ours
            )
    except Exception as error:  # noqa: BLE001 - Ray raises bare Exceptions, too
        where = f"at {address}" if address else "here"
        hint = "check --ray-address" if address else "free a core, or give --ray-address"
        raise AnomalydError(f"Ray cannot be used {where}: {reason(error)}; {hint}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _silence() -> Iterator[None]:
    """Ray's native half greets on file descriptor 2; what goes wrong is raised."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def reason(error: BaseException) -> str:
    """What an error from Ray comes down to, on one line."""
    # A task's error carries its whole traceback as text; the last line is the exception.
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines[-1] if lines else type(cause).__name__)[:300]


def _reach(address: str) -> None:
    """Ray tries for half a minute and then says little: look first whether anything answers."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray-address {address}: say HOST:PORT, as in 10.0.0.5:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise AnomalydError(
            f"--ray-address {address}: no Ray cluster answers there ({why}); check the address"
        ) from None
