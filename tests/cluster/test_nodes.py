"""The virtual cluster is what it says: separate hosts, real links, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import cluster as module
from tests.cluster.cluster import ROOT, Cluster, ClusterError, missing
from tests.cluster.conftest import Site, refuse
from tests.cluster.plan import Plan
from tests.recorded import losses


@pytest.mark.smoke
def test_links_are_as_slow_as_their_rate(cluster: Cluster) -> None:
    assert len(cluster.links) == 8
    assert all(link.good for link in cluster.links)


@pytest.mark.smoke
def test_nodes_are_hosts_of_their_own(cluster: Cluster, shared: Path) -> None:
    for name in cluster.plan.names:
        assert cluster.on(name, ["hostname"]).strip() == name
        cluster.on(name, ["bash", "-c", "ls /dev/shm; touch /tmp/of-$(hostname)"])
    assert cluster.on("node2", ["bash", "-c", "ls /tmp/of-*"]).split() == ["/tmp/of-node2"]
    (shared / "note").write_text("seen by all")
    assert cluster.on("node3", ["cat", str(shared / "note")]) == "seen by all"
    for name in ("node1", "head"):
        assert "10.77.0.4" in cluster.on(name, ["getent", "hosts", "node4"])


def test_commands_end_as_they_do_anywhere(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"code 7"):
        cluster.on("node1", ["bash", "-c", "exit 7"])
    with pytest.raises(ClusterError, match=r"node9 is down or unknown"):
        cluster.on("node9", ["true"])
    assert cluster.on("node1", ["echo", "a b", "$(id)", "it's"]) == "a b $(id) it's\n"
    with pytest.raises(ClusterError, match="not done in 0.5 s"):
        cluster.on("node2", ["sleep", "77.5"], timeout_s=0.5)
    until = time.monotonic() + 10
    while "77.5" in cluster.on("node2", ["ps", "ax"]):
        assert time.monotonic() < until, "the client has gone, its command has to go too"
        time.sleep(0.1)


RING = """
import hpctrain.transport.mpi as mpi, numpy as np
comm = mpi.start()
for _ in range(5):
    comm.allreduce(np.ones(1_000_000, np.float32))
print(comm.topology.describe())
"""


def test_bytes_over_a_link_are_those_of_the_algorithm(cluster: Cluster) -> None:
    before = cluster.link_bytes()
    out = cluster.run([sys.executable, "-c", RING], ranks=4, per_node=1)
    assert "4 ranks on 4 nodes (1+1+1+1)" in out
    after = cluster.link_bytes()
    ring = 5 * 2 * 3 / 4 * 4_000_000  # five sums of 4 MB, 2(P-1)/P each
    for name in cluster.plan.names:
        for earlier, later in zip(before[name], after[name], strict=True):
            # Frames and acknowledgements add 5 to 9 %, starting MPI a few 100 kB.
            assert ring < later - earlier < 1.12 * ring + 1.5e6


def test_a_node_dies_and_comes_back() -> None:
    """On a cluster of its own: SLURM's daemon would die along."""
    if reason := missing():
        refuse(reason)
    with Cluster.up(2, "none") as cluster:
        cluster.kill_node("node2")
        with pytest.raises(ClusterError, match="node2 is down"):
            cluster.on("node2", ["true"])
        call = "import socket; socket.create_connection(('node2', 22), timeout=0.3)"
        with pytest.raises(ClusterError, match="code 1"):
            cluster.on("node1", [sys.executable, "-c", call])
        cluster.start_node("node2")
        assert cluster.on("node2", ["hostname"]).strip() == "node2"
        sent, received = cluster.link_bytes()["node2"]
        assert sent < 10_000
        assert received < 10_000


CRASHES = """
import os, sys, time
from pathlib import Path
from tests.cluster.cluster import Cluster
cluster = Cluster.up(2, "none", folder=Path(sys.argv[1]))
cluster.start(["sleep", "4321"], node="node1")
time.sleep(0.5)
print(cluster.pid, flush=True)
time.sleep(60)
"""


def test_nothing_is_left_when_its_user_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CRASHES, str(tmp_path / "state")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ) as user:  # fmt: skip
        assert user.stdout
        pid = int(user.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        user.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while left := [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(tmp_path).encode() in _read(path) or b"4321" in _read(path)
    ]:
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.1)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    Cluster.sweep(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match="needs root"):
        Cluster.up(2)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.shutil, "which", lambda tool: None if tool == "tc" else tool)
    with pytest.raises(ClusterError, match=r"needs the packages iproute2: apt-get install"):
        Cluster.up(2)


@pytest.mark.parametrize("rate", ["fast", "0gbit", "1 gbit", "-1mbit"])
def test_impossible_rates_are_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="allowed is"):
        Plan("/nowhere", rate=rate)


@pytest.mark.smoke
def test_training_on_four_nodes_equals_training_on_one(
    cluster: Cluster, tmp_path: Path, shared: Path
) -> None:
    """Same ranks, other nodes: the losses agree to the rounding of the sums' order."""
    site = Site(tmp_path, None)
    found = []
    for per_node in (1, 4):
        out = f"run-{per_node}"
        command = ["hpctrain", "train", site.config(40), "--out", out]
        text = cluster.run(
            command, ranks=4, per_node=per_node, cwd=tmp_path, extra=site.environment
        )
        assert f"4 ranks on {4 // per_node} node" in text
        found.append(losses(tmp_path / out))
    assert len(found[0]) == 40
    for step, loss in found[0].items():
        assert loss == pytest.approx(found[1][step], rel=1e-5)


@pytest.mark.smoke
def test_doctor_sees_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    out = cluster.run(["hpctrain", "doctor", "--json"], ranks=4, per_node=1, cwd=tmp_path)
    report = json.loads(out[out.index("{") :])
    levels = {finding["check"]: finding for finding in report["findings"]}
    assert levels["nodes"]["level"] == "ok"
    assert not [f for f in report["findings"] if f["level"] == "fault"], out
