"""A virtual cluster from the command line: up, run, on, bytes, kill, start, down."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.cluster.cluster import Cluster, ClusterError
from tests.cluster.plan import HEAD
from tests.cluster.slurm import Slurm

EXAMPLES = """examples, as root and with the environment active:
  python -m tests.cluster up --nodes 4 --rate 1gbit
  python -m tests.cluster run -n 4 --per-node 1 -- python -m hpctrain doctor
  python -m tests.cluster on node2 -- cat /proc/net/dev
  python -m tests.cluster bytes
  python -m tests.cluster down
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", default="default", help="which cluster, where there are several")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start nodes and measure their links")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--rate", default="1gbit", help="1gbit, 100mbit, ...; none: not limited")
    up.add_argument("--share", type=Path, action="append", default=[], metavar="FOLDER",
                    help="a folder below /tmp that all nodes see; may be repeated")  # fmt: skip
    up.add_argument("--slurm", action="store_true", help="slurmctld on the head, slurmd on nodes")
    run = commands.add_parser("run", help="start ranks with mpirun")
    run.add_argument("-n", type=int, required=True, help="ranks")
    run.add_argument("--per-node", type=int, help="ranks on each node; default: spread evenly")
    on = commands.add_parser("on", help="run a command on one node (node1, ..., head)")
    on.add_argument("node")
    for one in (run, on):
        one.add_argument("words", nargs="+", metavar="-- COMMAND")
    commands.add_parser("bytes", help="what crossed each node's link so far")
    for name, text in (("kill", "a node loses its power"), ("start", "a killed node comes back")):
        commands.add_parser(name, help=text).add_argument("node")
    commands.add_parser("down", help="end everything and remove the cluster's folder")
    given = parser.parse_args()
    try:
        return _do(given)
    except (ClusterError, ValueError) as error:
        print(f"tests.cluster: {error}", file=sys.stderr)
        return 1


def _do(given: argparse.Namespace) -> int:
    folder = Path("/tmp", f"cluster-{given.name}")
    cluster = Cluster.find(folder)
    if given.command == "up":
        if cluster:
            raise ClusterError(f"{given.name} is up already: end it with `down` first")
        Cluster.sweep(folder)
        cluster = Cluster.up(
            given.nodes, given.rate, folder=folder, shared=given.share, lasting=True
        )
        for link in cluster.links:
            print(link)
        if given.slurm:
            Slurm(cluster).__enter__()
            print("SLURM is up: python -m tests.cluster on head -- sinfo")
        print(f"{given.nodes} nodes are up; state in {folder}")
        return 0
    if not cluster:
        Cluster.sweep(folder)
        if given.command == "down":
            print(f"no cluster {given.name} is up")
            return 0
        raise ClusterError(f"no cluster {given.name} is up: python -m tests.cluster up")
    if given.command == "down":
        cluster.down()
    elif given.command == "bytes":
        for node, (sent, received) in cluster.link_bytes().items():
            print(f"{node}  sent {sent:>15,}  received {received:>15,}")
    elif given.command == "kill":
        cluster.kill_node(given.node)
    elif given.command == "start":
        cluster.start_node(given.node)
    else:
        words, node = given.words, HEAD
        if given.command == "run":
            words = cluster.mpirun(words, given.n, given.per_node)
        else:
            node = given.node
        return _wait(cluster.start(words, node=node, cwd=Path.cwd()))
    return 0


def _wait(process: subprocess.Popen[str]) -> int:
    code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
