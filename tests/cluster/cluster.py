"""A cluster on this machine, seen from outside: start it, run commands on it, end it.

with Cluster.up(nodes=4, rate="1gbit") as cluster:
    cluster.run(["python", "-c", "..."], ranks=4, per_node=1)
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster import launchers, links
from tests.cluster.inside import UNSHARE
from tests.cluster.plan import HEAD, Plan

ROOT = Path(__file__).resolve().parents[2]
_TOOLS = {
    "ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux",
    "setpriv": "util-linux", "mount": "mount", "hostname": "hostname",
}  # fmt: skip


class ClusterError(RuntimeError):
    """The cluster cannot be had here, or something went wrong with it; says what to do."""


def missing() -> str | None:
    """Why no virtual cluster can be started here, None if it can."""
    if os.geteuid() != 0:
        return "a virtual cluster needs root (network namespaces and link shaping); use sudo"
    lacking = sorted({package for tool, package in _TOOLS.items() if not shutil.which(tool)})
    if lacking:
        return f"a virtual cluster needs the packages {', '.join(lacking)}: apt-get install them"
    return None


class Cluster:
    """A running virtual cluster. All methods are called from outside of it."""

    def __init__(self, plan: Plan, pid: int, process: subprocess.Popen[str] | None = None) -> None:
        self.plan = plan
        self.pid = pid
        """Process 1 of the cluster, as numbered outside."""
        self.links: list[links.Link] = []
        """As measured by `up`."""
        self._process = process

    @staticmethod
    def up(
        nodes: int = 4,
        rate: str = "1gbit",
        *,
        folder: Path | None = None,
        shared: Sequence[Path] = (),
        lasting: bool = False,
        measure: bool = True,
    ) -> Cluster:
        """Start the nodes, measure their links, return when all is ready.

        Args:
            nodes: how many, named node1, node2, ...
            rate: of each node's link in each direction ("100mbit", "1gbit", "none").
            folder: keeps the cluster's state; a fresh one below /tmp by default.
            shared: folders below /tmp that all nodes see; the checkout and the Python environment
                always are. Everything that is not below /tmp is shared anyway.
            lasting: survive this process (for the command line); else the kernel ends the cluster
                with the process that started it, however that one ends.
            measure: refuse links that do not behave as their rate says.

        Raises:
            ClusterError: not root, a tool is missing, or the links are not what was asked for.
        """
        reason = missing()
        if reason:
            raise ClusterError(reason)
        home = folder or Path(tempfile.mkdtemp(prefix="cluster.", dir="/tmp"))
        for part in ("pids", "tmp"):
            (home / part).mkdir(parents=True, exist_ok=True)
        home.chmod(0o755)
        seen = (ROOT, Path(sys.prefix), Path(sys.base_prefix), Path.cwd(), *shared)
        plan = Plan(str(home), nodes, rate, tuple(str(path) for path in seen))
        plan.save()
        plan.path("hosts").write_text(plan.hosts_text())
        agent = plan.path("agent")
        agent.write_text(_AGENT.format(python=shlex.quote(sys.executable), root=str(ROOT)))
        agent.chmod(0o755)
        tied = [] if lasting else ["setpriv", "--pdeathsig", "KILL", "--"]
        head = [sys.executable, "-m", "tests.cluster.inside", "head", plan.folder]
        with open(plan.path("head.log"), "a") as log:
            process = subprocess.Popen(
                [*tied, *UNSHARE, *head],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert process.stdout
        if process.stdout.readline() != "READY\n":
            process.wait()
            text = plan.path("head.log").read_text()[-2000:]
            shutil.rmtree(home, ignore_errors=True)
            raise ClusterError(f"the cluster did not start:\n{text}")
        process.stdout.close()
        cluster = Cluster(plan, _children(process.pid)[0], process)
        plan.path("cluster.json").write_text(
            json.dumps({"pid": cluster.pid, "started": _started(cluster.pid)})
        )
        try:
            if measure and plan.bits_per_s:
                cluster.links = links.measure(cluster)
        except BaseException:
            cluster.down()
            raise
        return cluster

    @staticmethod
    def find(folder: Path) -> Cluster | None:
        """The cluster whose state is in a folder, None if it does not run any more."""
        try:
            noted = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            return None
        if _started(noted["pid"]) != noted["started"]:
            return None
        return Cluster(Plan.load(str(folder)), noted["pid"])

    @staticmethod
    def sweep(folder: Path) -> None:
        """Remove what a cluster that does not run any more left in a folder."""
        if (folder / "plan.json").is_file():
            shutil.rmtree(folder)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def down(self) -> None:
        """End every process of the cluster and remove its folder; devices and mounts go along."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self._process:
            self._process.wait()
        deadline = time.monotonic() + 20
        while _started(self.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        shutil.rmtree(self.plan.folder, ignore_errors=True)

    def environment(self, extra: Mapping[str, str] = {}) -> dict[str, str]:  # noqa: B006
        """What a login on this cluster would set: MPI and SLURM find their way."""
        found = {**os.environ, **launchers.environment(self.plan), **extra}
        if self.plan.slurm_conf.exists():
            found |= {"SLURM_CONF": str(self.plan.slurm_conf)}
            # Each node numbers its processes on its own, and SLURM's PMIx was built with munge.
            found |= {"PMIX_MCA_gds": "hash", "PMIX_MCA_psec": "native"}
        return found

    def start(
        self,
        command: Sequence[str],
        *,
        node: str = HEAD,
        extra: Mapping[str, str] = {},  # noqa: B006
        cwd: Path | None = None,
        **streams: object,
    ) -> subprocess.Popen[str]:
        """Start a command on a node; it dies with this process. `signal` reaches it."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--pid"]
        tied = ["setpriv", "--pdeathsig", "KILL", "--"]
        words = list(command)
        if node != HEAD:
            words = [str(self.plan.path("agent")), node, shlex.join(words)]
        inside = [*enter, "--wd=" + str(cwd or ROOT), *tied, *words]
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            inside, cwd=cwd or ROOT, env=self.environment(extra), text=True, **streams
        )

    def on(
        self, node: str, command: Sequence[str], *, timeout_s: float = 120, **more: object
    ) -> str:
        """Run a command on a node; its output. Raises ClusterError on any other code than 0."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | more
        process = self.start(command, node=node, **streams)  # type: ignore[arg-type]
        return _finish(process, command, timeout_s)

    def run(
        self,
        command: Sequence[str],
        *,
        ranks: int,
        per_node: int | None = None,
        timeout_s: float = 300,
        **more: object,
    ) -> str:
        """Run ranks with mpirun from the head; the output. ClusterError if they fail."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | more
        process = self.start(self.mpirun(command, ranks, per_node), **streams)  # type: ignore[arg-type]
        return _finish(process, command, timeout_s)

    def mpirun(self, command: Sequence[str], ranks: int, per_node: int | None = None) -> list[str]:
        """The words that start ranks on this cluster, given to `start` on the head."""
        return [*launchers.words(self.plan, ranks, per_node), *command]

    @staticmethod
    def signal(process: subprocess.Popen[str], number: int) -> None:
        """Send a signal to the command that `start` started on the head (mpirun, as a rule)."""
        for child in _children(process.pid):
            os.kill(child, number)

    def kill_node(self, name: str) -> None:
        """As if its power failed: all its processes end at once, its link is gone."""
        pid = self.plan.pid(name)
        self.plan.path("pids", name).unlink()
        self.on(HEAD, ["kill", "-KILL", str(pid)])

    def start_node(self, name: str) -> None:
        """Bring a killed node back, empty."""
        code = (
            f"from tests.cluster import inside, plan; "
            f"inside.start_node(plan.Plan.load({self.plan.folder!r}), {name!r})"
        )
        self.on(
            HEAD, [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
        )

    def link_bytes(self) -> dict[str, tuple[int, int]]:
        """Node -> (bytes sent, bytes received) over its link since it started."""
        return {
            name: links.counters(self.on(name, ["cat", "/proc/net/dev"]))
            for name in self.plan.names
        }


_AGENT = """#!/bin/sh
folder=$(dirname "$0")
exec {python} -S -c 'import sys
sys.path.insert(0, "{root}")
from tests.cluster.remote import main
sys.exit(main())' "$folder" "$@"
"""


def _finish(process: subprocess.Popen[str], command: Sequence[str], timeout_s: float) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise ClusterError(
            f"{shlex.join(command)}: not done in {timeout_s:g} s:\n{output}"
        ) from None
    if process.returncode:
        raise ClusterError(f"{shlex.join(command)}: code {process.returncode}:\n{output}")
    return output


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _started(pid: int) -> str | None:
    """When a process started (ticks), None if it is gone; tells apart reused numbers."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
