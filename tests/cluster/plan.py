"""What a virtual cluster consists of: names, addresses, link rate, folders. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

HEAD = "head"
NETWORK = "10.77.0.0/24"
_PREFIX = "10.77.0."
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Plan:
    """One cluster; written to its folder so that every process of it reads the same."""

    folder: str
    """State of the cluster: sockets, logs, private folders of the nodes. Seen by all nodes."""
    nodes: int = 4
    rate: str = "1gbit"
    """Of each node's link, in each direction: kbit, mbit or gbit per second, or "none"."""
    shared: tuple[str, ...] = field(default=())
    """Folders below /tmp that all nodes see; all else below /tmp is private to each node."""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 64:
            raise ValueError(f"nodes = {self.nodes}: a virtual cluster has 1 to 64")
        _ = self.bits_per_s

    @property
    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def bits_per_s(self) -> float | None:
        """The link's rate, None where it is not limited."""
        if self.rate == "none":
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", self.rate)
        if not found or float(found[1]) <= 0:
            raise ValueError(f'rate = "{self.rate}": allowed is e.g. "1gbit", "100mbit" or "none"')
        return float(found[1]) * _UNITS[found[2]]

    def address(self, name: str) -> str:
        if name == HEAD:
            return f"{_PREFIX}254"
        return f"{_PREFIX}{self.names.index(name) + 1}"

    def hosts_text(self) -> str:
        """/etc/hosts of every node."""
        rows = ["127.0.0.1 localhost", *(f"{self.address(n)} {n}" for n in [*self.names, HEAD])]
        return "\n".join(rows) + "\n"

    def path(self, *parts: str) -> Path:
        return Path(self.folder, *parts)

    @property
    def slurm_conf(self) -> Path:
        """Where SLURM's configuration is once SLURM has been started."""
        return self.path("slurm", "slurm.conf")

    def pid(self, name: str) -> int | None:
        """Process 1 of a node, as numbered inside the cluster; None while the node is down."""
        try:
            return int(self.path("pids", name).read_text())
        except FileNotFoundError:
            return None

    def save(self) -> None:
        self.path("plan.json").write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(folder: str) -> Plan:
        found = json.loads(Path(folder, "plan.json").read_text())
        return Plan(**found | {"shared": tuple(found["shared"])})
