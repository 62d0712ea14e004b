"""A Ray cluster that was started before: does it answer, does it take this process's token, and do its nodes have what
a run needs?

Ray itself tries for long before it gives up, and does not say that it was the token.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ffr_verl.errors import FFRError

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
    given = {name: os.environ.get(f"RAY_AUTH_{name}") for name in ("MODE", "TOKEN", "TOKEN_PATH")}
    token = given["TOKEN_PATH"]
    if given["MODE"] == "token" and not given["TOKEN"] and token and not os.path.isfile(token):
        raise FFRError(f"{where}: RAY_AUTH_TOKEN_PATH={token}: no such file; give that of `ray start --head`")
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


def check_nodes(address: str, paths: Sequence[str], *, where: str) -> None:
    """Ask each node of a cluster, by a task of Ray's on it, for what a run needs there.

    Clusters behind a Ray client (`ray://...`) are not asked.

    Args:
        address: of the cluster, `HOST:PORT` or `auto`.
        paths: files and folders; relative ones start where `ray start` was called on the node.
        where: the cluster was named, for messages.

    Raises:
        FFRError: with a line for each node whose workers do not see a path, or this package; or when the nodes do not
            answer.
    """
    if "://" in address:
        return
    command = [sys.executable, "-m", __name__, address, *paths]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=2 * _SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise FFRError(f"{where}: its nodes have not answered for {2 * _SECONDS} s") from None
    if found.returncode != 0:
        said = (found.stderr.strip().splitlines() or [f"status {found.returncode}"])[-1]
        raise FFRError(f"{where}: its nodes could not be asked for what the run needs: {said}")
    problems = []
    for node, (folder, absent) in json.loads(found.stdout.splitlines()[-1]).items():
        if absent:
            problems.append(
                f"{where}: node {node} does not have {', '.join(absent)} (seen from {folder}, where `ray start` was "
                "called): every node needs data, models, embedding store and package at the same paths"
            )
    if problems:
        raise FFRError("\n".join(problems))


def _seen(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder of this worker, and what of the paths it does not see."""
    absent = [path for path in paths if not os.path.exists(path)]
    return os.getcwd(), absent if importlib.util.find_spec("ffr_verl") else [*absent, "the package ffr_verl"]


def _ask_nodes(address: str, paths: Sequence[str]) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    seen = ray.remote(num_cpus=0)(_seen)
    asked = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}:{node['NodeManagerPort']})": seen.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(paths)
        for node in ray.nodes()
        if node["Alive"]
    }
    return dict(zip(asked, ray.get(list(asked.values()), timeout=_SECONDS), strict=True))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_ask_nodes(sys.argv[1], sys.argv[2:])) + "\n")
