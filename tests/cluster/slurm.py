"""A real SLURM on a virtual cluster: slurmctld on the head, slurmd on every node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.cluster.cluster import Cluster, ClusterError
from tests.cluster.plan import HEAD

_TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge"}
_PMIX = Path("/usr/lib", f"{os.uname().machine}-linux-gnu", "pmix2/lib/libpmix.so")
"""What Debian's SLURM loads for --mpi=pmix."""
CPUS = 4
"""Of each node, as SLURM counts them; they need not exist."""
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


class Slurm:
    """Controller, authentication and node daemons of one cluster; ends with the cluster.

    Args:
        cluster: where to start it.
        topology: node name -> switch name; gives SLURM_TOPOLOGY_ADDR a tree.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        topology: Mapping[str, str] = {},  # noqa: B006
    ) -> None:
        if reason := Slurm.missing():
            raise ClusterError(reason)
        self.cluster = cluster
        self._conf = cluster.plan.slurm_conf
        self._folder = self._conf.parent
        for part in ("state", *(f"spool-{n}" for n in cluster.plan.names)):
            (self._folder / part).mkdir(parents=True, exist_ok=True)
        self._conf.write_text(self._configuration(bool(topology)))
        (self._folder / "topology.conf").write_text(_switches(topology))

    @staticmethod
    def missing() -> str | None:
        """Why no SLURM can be started here, None if it can."""
        lacking = {package for tool, package in _TOOLS.items() if not shutil.which(tool)}
        if not _PMIX.exists():
            lacking.add("libpmix-dev")
        if lacking:
            return f"SLURM needs the packages {', '.join(sorted(lacking))}: apt-get install them"
        return None

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except ClusterError:
            self._show_logs()
            raise
        return self

    def _start(self) -> None:
        folder = self._folder
        key, socket = folder / "munge.key", folder / "munge.socket"
        self._head(["mungekey", "--create", "--keyfile", str(key)])
        self._head(
            [
                "munged", "--force", f"--key-file={key}", f"--socket={socket}",
                f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                f"--seed-file={folder}/munged.seed",
            ]
        )  # fmt: skip
        self._head(["slurmctld", "-f", str(self._conf)])
        for name in self.cluster.plan.names:
            self.start_slurmd(name)
        self._until_idle(len(self.cluster.plan.names))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The daemons end with the cluster; on an error what they said is shown."""
        if error:
            self._show_logs()

    def _show_logs(self) -> None:
        for log in sorted(self._folder.glob("*.log")):
            print(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}", file=sys.stderr)

    def start_slurmd(self, name: str) -> None:
        self.cluster.on(name, ["slurmd", "-f", str(self._conf), "-N", name])

    def sbatch(self, *words: str, cwd: Path | None = None, node: str = HEAD) -> str:
        """Submit; the job's id."""
        return (
            self.call("sbatch", "--parsable", *words, cwd=cwd, node=node).strip().splitlines()[-1]
        )

    def call(self, *words: str, cwd: Path | None = None, node: str = HEAD) -> str:
        """Run one of SLURM's commands, or any other that calls them; its output."""
        return self.cluster.on(node, list(words), cwd=cwd)

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job` as a table."""
        text = self.call("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(
        self, number: str, states: Sequence[str] = tuple(sorted(ENDED)), timeout_s: float = 180
    ) -> dict[str, str]:
        """Wait for a job to be in one of the states; its table.

        Raises:
            ClusterError: it did not get there in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            table = self.job(number)
            if table["JobState"] in states:
                return table
            if time.monotonic() > deadline or table["JobState"] in ENDED:
                queue = self.call("squeue", "--long")
                raise ClusterError(
                    f"job {number} is {table['JobState']} ({table.get('Reason')}), awaited: "
                    f"{', '.join(states)}\n{queue}"
                )
            time.sleep(0.3)

    def _until_idle(self, nodes: int, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            text = self.call("sinfo", "-h", "-o", "%T %D")
            ready = sum(int(line.split()[1]) for line in text.splitlines() if line[:4] == "idle")
            if ready == nodes:
                return
            if time.monotonic() > deadline:
                raise ClusterError(f"SLURM's nodes are not idle after {timeout_s:g} s:\n{text}")
            time.sleep(0.2)

    def _head(self, words: Sequence[str]) -> None:
        self.cluster.on(
            HEAD,
            words,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _configuration(self, tree: bool) -> str:
        plan, folder = self.cluster.plan, self._folder
        rows = {
            "ClusterName": "virtual",
            "SlurmctldHost": f"{HEAD}({plan.address(HEAD)})",
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge.socket",
            "CredType": "cred/munge",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool-%n",
            "TmpFS": "/tmp",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
            "SlurmctldLogFile": f"{folder}/slurmctld.log",
            "SlurmdLogFile": f"{folder}/slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SlurmdParameters": "config_overrides",
            "MpiDefault": "pmix",
            "ReturnToService": "2",
            "SlurmdTimeout": "10",
            "KillWait": "10",
            "InactiveLimit": "0",
            "SchedulerParameters": "sched_interval=2,bf_interval=2",
            **({"TopologyPlugin": "topology/tree"} if tree else {}),
        }
        lines = [f"{name}={value}" for name, value in rows.items()]
        for name in plan.names:
            lines.append(
                f"NodeName={name} NodeAddr={plan.address(name)} CPUs={CPUS} RealMemory=4000"
            )
        lines.append(
            "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
        )
        return "\n".join(lines) + "\n"


def _switches(topology: Mapping[str, str]) -> str:
    if not topology:
        return ""
    names = sorted(set(topology.values()))
    rows = [
        f"SwitchName={switch} Nodes={','.join(n for n, s in topology.items() if s == switch)}"
        for switch in names
    ]
    return "\n".join([*rows, f"SwitchName=core Switches={','.join(names)}"]) + "\n"
