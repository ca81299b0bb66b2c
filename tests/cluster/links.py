"""What a node's link does: its rate felt by small messages, and the bytes that crossed it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster

MESSAGE_BYTES = 120_000
IDLE_S = 0.07
_TIMES = 15
_OVERHEAD_S = 0.2e-3
_ATTEMPTS = 6


@dataclass(frozen=True)
class Link:
    """One node's link in one direction, as measured."""

    node: str
    direction: str
    """ "to" or "from" the node."""
    seconds: float
    """Median for MESSAGE_BYTES sent after IDLE_S without traffic."""
    ideal_s: float
    """MESSAGE_BYTES divided by the rate."""

    @property
    def good(self) -> bool:
        return 0.85 * self.ideal_s <= self.seconds <= 1.2 * self.ideal_s + _OVERHEAD_S

    def __str__(self) -> str:
        return (
            f"{self.direction} {self.node}: {MESSAGE_BYTES} bytes after {1e3 * IDLE_S:g} ms idle "
            f"took {1e3 * self.seconds:.2f} ms; the rate asks for {1e3 * self.ideal_s:.2f}"
        )


def measure(cluster: Cluster) -> list[Link]:
    """Every link in both directions; a busy machine gets several attempts per link.

    Raises:
        ClusterError: a link is not what was asked for, so no figure taken on it would be worth
            anything.
    """
    from tests.cluster.cluster import ClusterError

    links = []
    for node in cluster.plan.names:
        for direction in ("to", "from"):
            link = _measured(cluster, node, direction)
            for _ in range(_ATTEMPTS - 1):
                if not link.good:
                    link = _measured(cluster, node, direction)
            links.append(link)
    bad = [str(link) for link in links if not link.good]
    if bad:
        raise ClusterError(
            f"{len(bad)} of {len(links)} links do not behave as {cluster.plan.rate} "
            f"(is this machine busy?):\n  " + "\n  ".join(bad)
        )
    return links


def counters(text: str) -> tuple[int, int]:
    """(sent, received) bytes of eth0 from /proc/net/dev."""
    for line in text.splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "eth0":
            fields = values.split()
            return int(fields[8]), int(fields[0])
    raise ValueError("no eth0 in /proc/net/dev")


def _measured(cluster: Cluster, node: str, direction: str) -> Link:
    """Send messages over one link, from or to the head, whose own attachment has no limit."""
    assert cluster.plan.bits_per_s
    ideal_s = 8 * MESSAGE_BYTES / cluster.plan.bits_per_s
    pause_s = 1.2 * ideal_s + IDLE_S
    source, sink = ("head", node) if direction == "to" else (node, "head")
    listen = [sys.executable, "-S", "-c", _RECEIVER, cluster.plan.address(sink)]
    with cluster.start(listen, node=sink, stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout
        port = receiver.stdout.readline().strip()
        address = cluster.plan.address(sink)
        talk = [sys.executable, "-S", "-c", _SENDER, address, port, str(pause_s)]
        sent = json.loads(cluster.on(source, talk))
        arrived = json.loads(receiver.stdout.read())
    # One clock for all: the nodes share this machine's.
    seconds = [end - start for start, end in zip(sent, arrived, strict=True)]
    return Link(node, direction, statistics.median(seconds[2:]), ideal_s)


_RECEIVER = f"""
import json, socket, sys, time
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
client, _ = server.accept()
times = []
for _ in range({_TIMES}):
    left = {MESSAGE_BYTES}
    while left:
        left -= len(client.recv(left))
    times.append(time.monotonic())
print(json.dumps(times))
"""
_SENDER = f"""
import json, socket, sys, time
link = socket.create_connection((sys.argv[1], int(sys.argv[2])))
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
message = bytes({MESSAGE_BYTES})
times = []
for _ in range({_TIMES}):
    time.sleep(float(sys.argv[3]))
    times.append(time.monotonic())
    link.sendall(message)
print(json.dumps(times))
"""
