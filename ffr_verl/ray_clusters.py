"""A Ray cluster that was started before: does it answer, and does it take this process's token?

Ray itself tries for long before it gives up, and does not say that it was the token.
"""

from __future__ import annotations

import socket
import subprocess
import sys

from ffr_verl.errors import FFRError

__all__ = ["check_cluster"]

_SECONDS = 60


def check_cluster(address: str, *, where: str) -> None:
    """An `FFRError` when nothing answers at `HOST:PORT`, or the token is not the cluster's; other addresses (`auto`,
    `local`, `ray://...`) are not looked at. `where` is the option or variable that gave the address."""
    host, _colon, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass
    except (OSError, OverflowError, UnicodeError) as error:
        raise FFRError(f"{where}: nothing answers there ({error}); `ray start --head` prints its address") from None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise FFRError(f"{where}: no Ray cluster has answered there for {_SECONDS} s") from None
    if "AuthenticationError" in found.stderr:
        raise FFRError(
            f"{where}: the Ray cluster does not take this process's token; give RAY_AUTH_MODE=token and, as "
            "RAY_AUTH_TOKEN_PATH, the file with which `ray start --head` was called (or its text as RAY_AUTH_TOKEN)"
        )
    if found.returncode != 0:
        raise FFRError(f"{where}: what answers there is no Ray cluster; `ray start --head` prints its address")
