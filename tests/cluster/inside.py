"""What runs inside: process 1 of the cluster (its head) and process 1 of each node.

    python -m tests.cluster.inside head FOLDER         started in fresh namespaces by cluster.py
    python -m tests.cluster.inside node FOLDER NAME    started in fresh namespaces by start_node

A cluster is one tree of PID namespaces: ending the head's process 1 ends every process of every
node, and the kernel then removes network devices and mounts. Nothing needs to be undone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster import remote
from tests.cluster.plan import HEAD, NETWORK, Plan

UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child",
           "--propagation", "private", "--mount-proc"]  # fmt: skip
_BURST_S = 160e-6
_BURST_BYTES = (10_000, 64_000)


def main() -> None:
    role, folder = sys.argv[1:3]
    plan = Plan.load(folder)
    if role == "head":
        run_head(plan)
    else:
        run_node(plan, sys.argv[3])


def run_head(plan: Plan) -> None:
    """Process 1 of the cluster: a bridge, the nodes, and a server that starts commands on them."""
    _furnish(plan, HEAD)
    _ip("link", "set", "lo", "up")
    _ip("link", "add", "br0", "type", "bridge")
    _ip("addr", "add", f"{plan.address(HEAD)}/24", "dev", "br0")
    _ip("link", "set", "br0", "up")
    _route(plan, HEAD, "br0", [])
    for name in plan.names:
        start_node(plan, name)
    with remote.Server(plan) as server:
        print("READY", flush=True)
        log = os.open(plan.path("head.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        server.serve_for_ever()


def start_node(plan: Plan, name: str) -> None:
    """Start one node and its link. Run in the head's namespaces; also brings a dead node back."""
    command = [sys.executable, "-m", "tests.cluster.inside", "node", plan.folder, name]
    with open(plan.path("head.log"), "a") as log:
        process = subprocess.Popen(
            [*UNSHARE, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert process.stdout
    if process.stdout.readline() != "READY\n":
        raise RuntimeError(f"{name} did not start (code {process.wait()})")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    pid = children[0]
    number = plan.names.index(name) + 1
    # The kernel takes its time to remove a dead node's link.
    subprocess.run(["ip", "link", "delete", f"up{number}"], capture_output=True)
    _ip("link", "add", f"up{number}", "type", "veth", "peer", "name", f"peer{number}")
    _ip("link", "set", f"peer{number}", "netns", pid)
    _ip("link", "set", f"up{number}", "master", "br0", "up")
    inside = ["nsenter", "--target", pid, "--net"]
    _ip("link", "set", f"peer{number}", "name", "eth0", prefix=inside)
    _ip("link", "set", "lo", "up", prefix=inside)
    _ip("addr", "add", f"{plan.address(name)}/24", "dev", "eth0", prefix=inside)
    _ip("link", "set", "eth0", "up", prefix=inside)
    _route(plan, name, "eth0", inside)
    if plan.bits_per_s:
        _shape(plan, f"up{number}", [])
        _shape(plan, "eth0", inside)
    plan.path("pids", name).write_text(pid)


def run_node(plan: Plan, name: str) -> None:
    """Process 1 of a node: private folders, then nothing but burying the dead."""
    _furnish(plan, name)
    print("READY", flush=True)
    os.close(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.2)


def _shape(plan: Plan, device: str, prefix: list[str]) -> None:
    """Limit what leaves through a device.

    The burst is small, or small messages would not feel the link at all; a segment must fit into
    it, or it would be cut up and TCP would lose parts of it.
    """
    assert plan.bits_per_s
    least, most = _BURST_BYTES
    burst = int(min(max(plan.bits_per_s / 8 * _BURST_S, least), most))
    _ip("link", "set", "dev", device, "gso_max_size", str(burst * 4 // 5), prefix=prefix)
    limit = ["rate", plan.rate, "burst", str(burst), "latency", "100ms"]
    _run([*prefix, "tc", "qdisc", "add", "dev", device, "root", "tbf", *limit])


def _furnish(plan: Plan, name: str) -> None:
    """Host name, hosts file, /dev/shm and /tmp of this node's own; shared folders come back."""
    _run(["hostname", name])
    _run(["mount", "--bind", str(plan.path("hosts")), "/etc/hosts"])
    _run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"])
    shared = {Path(path).resolve() for path in (plan.folder, *plan.shared)}
    hidden = [path for path in shared if path.is_relative_to("/tmp")]
    # One inside another comes back with it.
    hidden = [
        path for path in hidden if not any(path.is_relative_to(p) for p in hidden if p != path)
    ]
    handles = {path: os.open(path, os.O_PATH) for path in hidden}
    private = plan.path("tmp", name)
    private.mkdir(parents=True, exist_ok=True)
    private.chmod(0o1777)
    _run(["mount", "--bind", str(private), "/tmp"])
    for path, handle in handles.items():
        path.mkdir(parents=True, exist_ok=True)
        link = f"/proc/{os.getpid()}/fd/{handle}"
        _run(["mount", "--no-canonicalize", "--bind", link, str(path)])
        os.close(handle)


def _route(plan: Plan, name: str, device: str, prefix: list[str]) -> None:
    """Reach the other nodes with the congestion control that most systems use."""
    words = ["src", plan.address(name), "congctl", "cubic"]
    _ip("route", "replace", NETWORK, "dev", device, *words, prefix=prefix)


def _ip(*words: str, prefix: list[str] | None = None) -> None:
    _run([*(prefix or []), "ip", *words])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()} (code {done.returncode})")


if __name__ == "__main__":
    main()
