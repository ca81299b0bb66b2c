"""The report: one line per finding for people, or JSON with stable keys for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.text import Text

import hpctrain
from hpctrain.doctor.facts import Facts
from hpctrain.doctor.finding import LEVELS, Finding, worst
from hpctrain.errors import EXIT_BACKEND, EXIT_COMPLETE
from hpctrain.transport.topology import Topology

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "fault": "bold red"}
_FORMAT = 1


@dataclass(frozen=True)
class Report:
    """What was found, on rank 0."""

    topology: Topology
    facts: tuple[Facts, ...]
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """69 with a fault, else 0."""
        return EXIT_BACKEND if worst(self.findings) == "fault" else EXIT_COMPLETE

    def to_json(self) -> str:
        """Local. Findings, then every rank's facts."""
        content = {
            "format": _FORMAT,
            "hpctrain": hpctrain.__version__,
            "ranks": self.topology.size,
            "nodes": self.topology.n_nodes,
            "level": worst(self.findings),
            "exit_code": self.exit_code,
            "findings": [asdict(finding) for finding in self.findings],
            "facts": [facts.model_dump(mode="json") for facts in self.facts],
        }
        return json.dumps(content, indent=1)

    def show(self, console: Console) -> None:
        """Local. A table of levels, checks and texts, wrapped to the console's width."""
        started = self.facts[0].mpi is not None
        where = self.topology.describe() if started else f"{self.facts[0].host}, MPI not started"
        console.print(Text(f"hpctrain {hpctrain.__version__}: {where}"))
        console.print()
        width = max((len(finding.check) for finding in self.findings), default=0)
        level_width = max(len(level) for level in LEVELS)
        indent = " " * (level_width + width + 4)
        for finding in self.findings:
            head = f"{finding.level:<{level_width}}  {finding.check:<{width}}  "
            lines = _wrapped(finding.text, head, indent, console.width)
            if finding.fix:
                lines += _wrapped(finding.fix, f"{indent}-> ", f"{indent}   ", console.width)
            text = Text("\n".join(lines))
            text.stylize(_STYLES[finding.level], 0, len(finding.level))
            console.print(text, soft_wrap=True)
        console.print()
        console.print(Text(_summary(self.findings)))


def _wrapped(text: str, head: str, indent: str, width: int) -> list[str]:
    room = max(width, len(indent) + 30)
    return textwrap.wrap(
        text,
        room,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _summary(findings: Sequence[Finding]) -> str:
    counts = {level: sum(one.level == level for one in findings) for level in LEVELS}
    graver = [
        f"{counts[level]} {level}{'s' * (counts[level] > 1)}"
        for level in reversed(LEVELS[1:])
        if counts[level]
    ]
    return ", ".join(graver) if graver else "nothing to remark"
