"""What rank 0 shows of a run: header, bar or plain lines, closing summary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table as Grid

from hpctrain.runs.console import Display
from hpctrain.runs.lines import Line
from hpctrain.stats.noise import NoiseEstimate
from hpctrain.stats.words import efficiency_in_words, noise_in_words


@dataclass(frozen=True)
class Summary:
    """What is shown at the end of a run."""

    results: dict[str, float]
    """Of the last evaluation: loss, accuracy."""
    steps: int
    """Taken by this attempt, as all below."""
    samples: int
    duration_s: float
    """Of the steps alone, without evaluations."""
    compute_s: float
    exchange_s: float
    sync_s: float
    input_s: float
    bytes_sent_intra: int | None
    bytes_sent_inter: int | None
    bytes_source: str | None
    folder: str
    following: Sequence[str] = ()
    """What to try next: one command or sentence each."""


class Progress:
    """Shows a run to a person or in a log; on ranks other than 0 (no console) it shows nothing.

    Use it in a `with` block around the loop.

    Args:
        console: from `make_console`; None on ranks other than 0.
        display: from `choose_display`.
        fraction: of the run that is done when this attempt starts.
        total_steps: None when the run's length is not given in steps.
        plain_every_s: at least so many seconds between two plain lines.
        ranks: how many share a batch.
    """

    def __init__(
        self,
        console: Console | None,
        display: Display,
        *,
        fraction: float = 0.0,
        total_steps: int | None = None,
        plain_every_s: float = 5.0,
        ranks: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._display: Display = display if console else "none"
        self._total_steps = total_steps
        self._every_s = plain_every_s
        self._ranks = ranks
        self._clock = clock
        self._first_fraction = fraction
        self._began_s = clock()
        self._shown_s = float("-inf")
        self._line: Line = {}
        self._bar: Bar | None = None
        if console and self._display == "bar":
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=console, refresh_per_second=4, expand=False)
            self._bar.update(self._bar.add_task("starting", total=1.0), completed=fraction)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, lines: Sequence[str]) -> None:
        """Print lines as they are, the header for one. Local."""
        if self._console and self._display != "none":
            for line in lines:
                self._console.print(line, soft_wrap=True)

    def show(self, line: Line) -> None:
        """Show a record line: a step's at the next `tick`, others at once. Local."""
        if line["kind"] == "step":
            self._line = line
        else:
            self.say([describe(line)])

    def tick(self, step: int, fraction: float) -> None:
        """A step is done, and `fraction` of the run. Call once per step. Local."""
        if self._display == "none":
            return
        now = self._clock()
        eta_s = self._eta_s(now, fraction)
        if self._bar:
            text = step_text(step, self._total_steps, self._line, eta_s, self._ranks)
            self._bar.update(self._bar.task_ids[0], completed=fraction, description=text)
        elif self._line and now - self._shown_s >= self._every_s:
            self._shown_s = now
            self.say([step_text(step, self._total_steps, self._line, eta_s, self._ranks)])

    def summary(self, summary: Summary) -> None:
        """The closing summary; shown with `progress = "none"` too. Local."""
        if self._console is None:
            return
        grid = Grid(show_header=False, pad_edge=True)
        for name, value in summary_rows(summary):
            grid.add_row(name, value)
        self._console.print(grid)
        self._console.print(f"run folder: {summary.folder}", soft_wrap=True)
        for position, text in enumerate(summary.following):
            self._console.print(f"{'      ' if position else 'next: '}{text}", soft_wrap=True)

    def _eta_s(self, now: float, fraction: float) -> float | None:
        gained = fraction - self._first_fraction
        return (now - self._began_s) * (1 - fraction) / gained if gained > 0 else None


def step_text(
    step: int, total_steps: int | None, line: Line, eta_s: float | None, ranks: int = 1
) -> str:
    """One plain line about a step; numbers of the last step line of the record. Local."""
    told = [f"step {step}" + (f"/{total_steps}" if total_steps else "")]
    for field, pattern in _STEP_FIELDS.items():
        if line.get(field) is not None:
            told.append(f"{pattern}".format(line[field]))
    if line.get("step_s") and line.get("exchange_s") is not None:
        told.append(f"exchange {line['exchange_s'] / line['step_s']:.0%}")
    if eta_s is not None:
        told.append(f"eta {clock_text(eta_s)}")
    return " ".join(told) + noise_text(line, ranks)


def noise_text(line: Line, ranks: int) -> str:
    """The batch and its measured noise, e.g. " | B 512 = 8x4x16 | B_S 3.1k [2.2k-4.6k] | ...".

    Ranks x passes x samples of a pass, where these make the batch without a rest. Local.
    """
    if line.get("bs_low") is None:
        return ""
    batch, passes = line["batch_global"], line["passes"] or 1
    each, rest = divmod(batch, ranks * passes)
    parts = [f"B {batch}" + ("" if rest else f" = {ranks}x{passes}x{each}")]
    b_s, high = line["bs_bound"], line["bs_high"]
    noise = NoiseEstimate(
        b_s=math.nan if b_s is None else b_s,
        low=line["bs_low"],
        high=math.inf if high is None else high,
        resolved=b_s is not None,
        s2=line["noise_s2"],
        mu2=line["noise_mu2"],
        steps=line["step"],
    )
    parts += [noise_in_words(noise), efficiency_in_words(noise, batch)]
    parts.append(f"cost {line['measure_share'] or 0.0:.1%}")
    return "".join(f" | {part}" for part in parts)


_STEP_FIELDS = {
    "epoch": "epoch {:.1f}",
    "loss": "loss {:.4g}",
    "accuracy": "accuracy {:.3f}",
    "lr": "lr {:.4g}",
    "samples_per_s": "{:.0f} samples/s",
}


def describe(line: Line) -> str:
    """A record line other than a step's, in words. Local."""
    if line["kind"] == "eval":
        measured = _numbers({key: line.get(key) for key in ("loss", "accuracy")})
        took = f" ({line['eval_s']:.1f} s)" if line.get("eval_s") is not None else ""
        return f"evaluation at step {line['step']}: {measured}{took}"
    if line["kind"] == "checkpoint":
        head = f"checkpoint of step {line['saved_step']}"
        if not line["ok"]:
            return f"{head} FAILED: {line['reason']}; the previous one is untouched"
        stall_ms = 1e3 * line["stall_s"]
        return f"{head} on disk after {line['save_s']:.1f} s; training stalled {stall_ms:.1f} ms"
    return str(line["text"])


def _result_rows(results: Mapping[str, float]) -> list[tuple[str, str]]:
    """Local. Per measure a row of the average of all replicas, and one of the replicas' own."""
    rows = []
    for name in [name for name in results if not name.startswith(("replica_", "leader_"))]:
        rows.append((f"held-out {name}", _number(name, results[name])))
        if f"replica_{name}_mean" in results:
            least, mean, most = (
                _number(name, results[f"replica_{name}_{which}"])
                for which in ("min", "mean", "max")
            )
            text = f"{least} to {most}, mean {mean}"
            if f"leader_{name}" in results:
                text += f"; leader {_number(name, results[f'leader_{name}'])}"
            rows.append((f"{name} of replicas", text))
    return rows


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """Name and value of each row of the closing summary. Local."""
    rows = _result_rows(summary.results)
    duration_s = summary.duration_s
    if summary.steps and duration_s > 0:
        speed = f"{summary.samples / duration_s:,.0f} samples/s, {summary.steps:,} steps"
        parts = {
            "compute": summary.compute_s,
            "exchange": summary.exchange_s,
            **({"sync": summary.sync_s} if summary.sync_s >= 1e-3 * duration_s else {}),
            "input": summary.input_s,
        }
        parts["other"] = max(duration_s - sum(parts.values()), 0.0)
        shares = ", ".join(f"{name} {part / duration_s:.0%}" for name, part in parts.items())
        rows += [("speed", speed), ("time", f"{clock_text(duration_s)}: {shares}")]
    sent = (summary.bytes_sent_intra, summary.bytes_sent_inter)
    intra, inter = ("unknown" if n is None else bytes_text(n) for n in sent)
    source = f" ({summary.bytes_source})" if summary.bytes_source else ""
    rows.append(("bytes sent", f"{intra} inside nodes, {inter} between nodes{source}"))
    return rows


def clock_text(seconds: float) -> str:
    """HH:MM:SS. Local."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def bytes_text(n: float) -> str:
    """Bytes with a decimal unit, e.g. "12.3 MB". Local."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            break
        n /= 1000
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"


def batch_equation(batch_global: int, size: int) -> str:
    """How a global batch is made, e.g. "batch_global 1,024 = 8 ranks x 128". Local."""
    each, more = divmod(batch_global, size)
    ranks = f"{size} rank{'s' if size > 1 else ''} x {each:,}"
    return f"batch_global {batch_global:,} = {ranks}" + (f" + {more}" if more else "")


def _numbers(values: dict[str, float | None]) -> str:
    return " ".join(f"{k} {_number(k, v)}" for k, v in values.items() if v is not None)


def _number(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4g}"
