"""A Ray cluster guarded by a token: those who may not join are told at once, by Ray's own command."""

from __future__ import annotations

import os
import re
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ffr_verl.errors import FFRError
from ffr_verl.ray_clusters import check_cluster, check_nodes


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Path]]:
    """Address and token of a head node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ffr-", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.write_text("0123456789abcdef" * 2)
        start = ["start", "--head", f"--port={port}", f"--temp-dir={folder}/ray", "--include-dashboard=false"]
        slots = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *start, *slots],
            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(60):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(1)
            yield f"127.0.0.1:{port}", token
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.parametrize("given", ["good", "bad", "none", "gone"])
def test_the_token_of_a_cluster(
    cluster: tuple[str, Path], given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, token = cluster
    if given == "bad":
        token = tmp_path / "token"
        token.write_text("f" * 32)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled" if given == "none" else "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    if given == "good":
        check_cluster(address, where="RAY_ADDRESS")
        return
    if given == "gone":
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
        with pytest.raises(
            FFRError, match=r"RAY_ADDRESS: RAY_AUTH_TOKEN_PATH=.*gone: no such file; give that of `ray"
        ):
            check_cluster(address, where="RAY_ADDRESS")
        return
    with pytest.raises(FFRError, match=r"RAY_ADDRESS: the Ray cluster does not take this process's token; give RAY_A"):
        check_cluster(address, where="RAY_ADDRESS")


@pytest.fixture
def hidden(cluster: tuple[str, Path], tmp_path: Path) -> Iterator[Path]:
    """A folder that a second node of the cluster does not see."""
    address, token = cluster
    folder = tmp_path / "data"
    folder.mkdir()
    join = f"{sys.executable} -m ray.scripts.scripts start --address={address} --num-cpus=1 --block"
    join += " --object-store-memory=80000000 --disable-usage-stats"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace of one's own here (util-linux's unshare, and the right to use it)")
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {folder} && exec {join}"],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield folder
    process.terminate()
    process.wait(60)


def test_a_node_without_the_shared_folder(
    cluster: tuple[str, Path], hidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, token = cluster
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    check_nodes(address, ["/"], where="RAY_ADDRESS")
    (hidden / "train.parquet").touch()
    deadline = time.monotonic() + 60
    while True:  # until the second node is there
        try:
            check_nodes(address, [str(hidden / "train.parquet")], where="RAY_ADDRESS")
        except FFRError as error:
            message = str(error)
            break
        assert time.monotonic() < deadline
    assert re.fullmatch(
        rf"RAY_ADDRESS: node \S+ \(\S+\) does not have {hidden}/train\.parquet \(seen from .*", message
    )


def test_nothing_answers() -> None:
    with pytest.raises(FFRError, match=r"--ray 127\.0\.0\.1:9: nothing answers there .*`ray start --head` prints its"):
        check_cluster("127.0.0.1:9", where="--ray 127.0.0.1:9")
    check_cluster("auto", where="--ray")


def test_something_else_answers() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(FFRError, match="what answers there is no Ray cluster"):
            check_cluster(f"127.0.0.1:{server.server_address[1]}", where="--ray")
        server.shutdown()
