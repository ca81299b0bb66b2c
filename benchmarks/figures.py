"""Draws the figures of the documentation from the records of the benchmarks.

python -m benchmarks.figures [--results benchmarks/results] [--out docs/figures] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "hpctrain", "svg.fonttype": "none", "font.size": 9})

from matplotlib import pyplot  # noqa: E402 - the backend comes first
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.peers.target import Target  # noqa: E402

Record = dict[str, Any]
OURS, OTHERS, LIMIT, INK = "#2a6f97", "#b0b7bd", "#c1121f", "#1b1b1b"


def panels_of(
    rows: int, columns: int, size: tuple[float, float], title: str, **how: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row."""
    figure, panels = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **how
    )
    for panel in panels.flat:
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure, list(panels.flat)


def bars(
    panel: Axes, rounds_of: Mapping[str, Sequence[float]], text: Callable[[float], str]
) -> None:
    """A bar per system, first on top: the median of its rounds, which are dots."""
    systems = list(rounds_of)[::-1]
    for place, system in enumerate(systems):
        rounds = rounds_of[system]
        ours = system.startswith(("hpctrain", "gather", "owner", "exclusive"))
        median = statistics.median(rounds)
        panel.barh(place, median, color=OURS if ours else OTHERS, height=0.65)
        if len(rounds) > 1:
            panel.plot(rounds, [place] * len(rounds), ".", color=INK, markersize=3)
        at = (max(rounds), place)
        panel.annotate(text(median), at, (4, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(systems)), systems)
    low, high = panel.get_xlim()
    panel.set_xlim(low, high * (1.5 if panel.get_xscale() == "log" else 1.1))


def allreduce(results: Path) -> Figure:
    """Time of a dense sum over the link's floor."""
    record = read(results / "allreduce.json")
    title = f"Dense sum of float32, {record['nodes']} nodes x 1 rank, {record['rate']} links"
    sizes = list(record["floor_s"])
    figure, panels = panels_of(1, len(sizes), (9, 3.6), title, sharey=True)
    for panel, size in zip(panels, sizes, strict=True):
        floor = record["floor_s"][size]
        rounds = {
            system: [seconds / floor for seconds in by_size[size]]
            for system, by_size in record["seconds"].items()
        }
        bars(panel, rounds, "{:.2f}".format)
        panel.axvline(1, color=LIMIT, linewidth=1)
        panel.set_title(f"{size} MB; floor {1e3 * floor:.0f} ms", fontsize=10)
        panel.set_xlabel("time / the link's floor")
    return figure


def selection(results: Path) -> Figure:
    """Time of accumulate and select over that of an in-place addition."""
    seconds = read(results / "selection.json")["seconds"]
    title = "Accumulate and select: time over an in-place r += g, one core"
    figure, panels = panels_of(2, len(seconds) // 2, (10, 4.6), title, sharex=True, sharey=True)
    columns = len(seconds) // 2
    for place, (case, found) in enumerate(seconds.items()):
        n, density = (float(text) for text in case.split(", "))
        # Sizes are columns, densities rows.
        panel = panels[place % 2 * columns + place // 2]
        panel.set_xscale("log")
        panel.set_xlim(1.0, 120.0)
        floor = found["r += g"]
        peers = {name: [s / floor] for name, s in found.items() if name != "r += g"}
        bars(panel, peers, "{:.1f}".format)
        panel.axvline(10.0 if n < 1e7 else 5.0, color=LIMIT, linewidth=1)
        panel.set_title(f"{n:.3g} entries, {density:.1%} kept", fontsize=10)
    return figure


def sparse_exchange(results: Path) -> Figure:
    """Time of a step's exchange on two kinds of links."""
    rates = ("1gbit", "100mbit")
    records = [read(results / f"sparse_exchange_{rate}.json") for rate in rates]
    title = "Accumulate, exchange and apply: 4 nodes x 1 rank, 1e7 parameters, 1 % per node"
    figure, panels = panels_of(1, len(records), (10, 3.0), title)
    for panel, record in zip(panels, records, strict=True):
        panel.set_xscale("log")
        panel.set_xlim(10.0, 10_000.0)
        rounds = {
            name: [1e3 * run["seconds"] for run in runs] for name, runs in record["runs"].items()
        }
        bars(panel, rounds, "{:.0f}".format)
        panel.set_xlabel("ms")
        panel.set_title(f"{record['rate']} links", fontsize=10)
    return figure


def never_slower(results: Path) -> Figure:
    """Ratio of `auto` to the faster dense exchange, with its upper bound."""
    paths = sorted(results.glob("never_slower_*.json"))
    cells = [cell for path in paths for cell in read(path)["results"]]
    cells.sort(key=lambda cell: (["one host", "1gbit", "100mbit"].index(cell["rate"]), cell["n"]))
    title = 'exchange.kind = "auto" over the faster dense exchange, 2 ranks'
    figure, (panel,) = panels_of(1, 1, (7, 0.3 * len(cells) + 1.4), title)
    panel.set_xscale("log")
    panel.set_xlim(0.01, 1.5)
    for place, cell in enumerate(cells[::-1]):
        panel.plot([cell["ratio"], cell["upper_95"]], [place] * 2, color=OURS)
        panel.plot(cell["ratio"], place, "o", color=OURS, markersize=4)
    names = [f"{cell['rate']}, {cell['n']:,} entries" for cell in cells[::-1]]
    panel.set_yticks(range(len(cells)), names)
    panel.axvline(1.05, color=LIMIT, linewidth=1)
    panel.set_xlabel("ratio of step times (dot) and its upper 95 % bound (end of the line)")
    return figure


def density(results: Path) -> Figure:
    """Bits to the middle target by fixed count; a line marks what the tuned count needed."""
    record = read(results / "density.json")
    target = str(record["problem"]["targets"][1])
    title = f"w8a, 4 nodes, gap {target}; dotted: tuned count"
    figure, panels = panels_of(1, len(record["cases"]), (11, 3.4), title, sharey=True)
    for panel, (name, case) in zip(panels, record["cases"].items(), strict=True):
        for label, color in zip(record["costs"], (OTHERS, OURS, LIMIT), strict=True):
            found = case[label][target]
            pairs = zip(case["counts"], found["cost_of_counts"], strict=True)
            points = np.array([(count, bits) for count, bits in pairs if bits])
            if len(points):
                panel.plot(*points.T, color=color, linewidth=1.2, label=f"fixed T, {label}")
            if found["tuned_cost"]:
                panel.axhline(found["tuned_cost"], color=color, linewidth=1, linestyle=":")
        panel.set(xscale="log", yscale="log")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("entries kept per node, of 300")
    panels[0].set_ylabel("bits to the target")
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def time_to_target(results: Path, record: str = "time_to_target.json") -> Figure:
    """The target's measure against seconds and against MB sent per node; a line per seed."""
    groups, drawn = [], []
    for group in read(results / record)["groups"]:
        systems = group["systems"].items()
        shown = {n: found for n, found in systems if "curves" in found and "step_s" in found}
        if group["rate"] and shown:
            groups.append(group)
            drawn.append(shown)
    title = "Whole trainings: steps of the unshaped run x the shaped step"
    figure, panels = panels_of(len(groups), 2, (10, 3.6 * len(groups)), title, sharey="row")
    peers = dict.fromkeys(
        name for g in groups for name in g["systems"] if not name.startswith("hpctrain")
    )
    colors = {name: f"C{1 + place % 9}" for place, name in enumerate(peers)}
    times: dict[str, float] = {}
    for shown in drawn:
        for name in shown.keys() - peers.keys():
            times[name] = min(times.get(name, np.inf), shown[name].get("time_s", np.inf))
    fastest_first = sorted(times, key=lambda name: (times[name], name))
    lines = ("-", "--", ":", "-.", (0, (6, 1)), (0, (1, 3)), (0, (4, 1, 1, 1, 1, 1)))
    styles = dict(zip(fastest_first, lines, strict=False))
    for number, (group, shown) in enumerate(zip(groups, drawn, strict=True)):
        row = panels[2 * number : 2 * number + 2]
        target = Target.parse(group["target"])
        for name, found in shown.items():
            for seed, curve in enumerate(found["curves"]):
                scales = (found["step_s"], found["link_bytes_per_step"] / 1e6)
                for panel, scale in zip(row, scales, strict=True):
                    panel.plot(
                        [point[0] * scale for point in curve],
                        [point[target.column] for point in curve],
                        color=colors.get(name, OURS),
                        linewidth=0.9 if name in peers else 1.6,
                        linestyle=styles.get(name, "-"),
                        label=name if seed == 0 else None,
                    )
        for panel, label in zip(row, ("seconds", "MB sent per node"), strict=True):
            panel.set_xscale("log")
            panel.set_xlabel(label)
        if any("time_s" in found for found in shown.values()):
            for panel in row:
                panel.axhline(target.value, color=LIMIT, linewidth=0.8)
            # Where it is decided: the last tenth on the way to the target.
            ends = (-0.06, 0.02) if target.measure == "accuracy" else (-0.17, 0.5)
            row[0].set_ylim(target.value + ends[0], target.value + ends[1])
        row[0].set_ylabel(f"held-out {target.measure}")
        row[0].set_title(f"{group['task']}, {group['place']}, {group['rate']}")
        row[1].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def straggler(results: Path) -> Figure:
    """What one slow rank leaves of the others' pace, and how long they wait."""
    record = read(results / "straggler.json")
    title = f"One of 4 ranks computes {record['factor']:g} times longer; the others:"
    figure, panels = panels_of(1, 2, (9, 2.6), title, sharey=True)
    for panel, key, label in zip(
        panels, ("kept", "waits"), ("steps per second kept", "more of the time outside the model"),
        strict=True,
    ):  # fmt: skip
        rounds = {name: found[key] for name, found in record["systems"].items()}
        bars(panel, rounds, "{:.1%}".format)
        panel.set_xlabel(label)
    return figure


def non_iid(results: Path) -> Figure:
    """Replicas with unlike data: who is elected, what they are reconciled by, pull and period."""
    record = read(results / "non_iid.json")
    title = "Fashion-MNIST, 8 replicas, accuracy of their average (%); dots: seeds"
    figure, (data, rules, knobs) = panels_of(1, 3, (12, 3.8), title)
    partitions = [p for p in ("iid", "dirichlet") if f"8 replicas, {p}" in record["elections"]]
    for score, color, aside in (("probe", OURS, -0.08), ("train_loss", LIMIT, 0.08)):
        found = [record["elections"][f"8 replicas, {p}"][score]["accuracy"] for p in partitions]
        places = [place + aside for place in range(len(found))]
        means_of(data, places, found, color=color, linestyle="none", label=score)
    data.set_xticks(range(len(partitions)), partitions)
    data.set_xlim(-0.5, len(partitions) - 0.5)
    data.set_title("Leader SGD, pull 0.5, every 16", fontsize=10)
    beside = record["compared"]
    shown = [name for name in beside if len(beside[name]["accuracy"]["seeds"]) > 2]
    shown = [name for name in shown if not name.startswith("averaging")][::-1]
    for place, name in enumerate(shown):
        more = beside[name]["less averaging as often"]
        color = OURS if name.startswith("FedAWARE") else INK
        rules.errorbar(more["mean"], place, xerr=more["half_95"], fmt="o", color=color)
        rules.plot(more["each"], [place] * len(more["each"]), ".", color=OTHERS, markersize=4)
    rules.set_yticks(range(len(shown)), shown, fontsize=8)
    rules.axvline(0, color=LIMIT, linewidth=1)
    rules.set_title("points more than averaging as often, 95 %", fontsize=10)
    periods = [4, 16, 64]
    lines = {f"probe, pull {pull}": (OURS, s) for pull, s in ((0.1, ":"), (0.5, "--"), (1.0, "-"))}
    for name, (color, style) in (lines | {"train_loss, pull 0.5": (LIMIT, "--")}).items():
        found = [record["knobs"][f"{name}, every {every}"] for every in periods]
        means_of(knobs, periods, found, color=color, linestyle=style, label=name)
    knobs.set_xscale("log", base=2)
    knobs.set_xticks(periods, [str(every) for every in periods])
    knobs.set_xlabel("steps between elections")
    knobs.set_title("Leader SGD, Dirichlet 0.1", fontsize=10)
    for panel in (data, knobs):
        panel.legend(fontsize=7, frameon=False)
    return figure


def means_of(panel: Axes, places: Sequence[float], found: Sequence[Record], **how: Any) -> None:
    """Means over the seeds that all have, and every seed as a dot."""
    fewest = min(len(f["each"]) for f in found)
    each = [f["each"][:fewest] for f in found]
    panel.plot(places, [statistics.fmean(e) for e in each], marker="o", linewidth=1.2, **how)
    for place, values in zip(places, each, strict=True):
        panel.plot([place] * len(values), values, ".", color=how["color"], alpha=0.4)


def decentralised(results: Path) -> Figure:
    """Accuracy of decentralised SGD less that of exact averaging; the consensus distance."""
    record = read(results / "decentralised.json")
    title = f"Decentralised SGD, {record['replicas']} replicas, Fashion-MNIST"
    figure, (gaps, distances) = panels_of(1, 2, (10, 4.4), title)
    rows = [
        (f"{name}: {system}", found["minus_csgd"]["accuracy"], system)
        for name, setting in record["settings"].items()
        for system, found in setting["systems"].items()
        if "minus_csgd" in found and len(found["seeds"]) > 1
    ]
    for place, (_, gap, system) in enumerate(rows[::-1]):
        low, high = (100 * (gap["mean"] + sign * gap["half_width_95"]) for sign in (-1, 1))
        color = OTHERS if system == "sam" else OURS
        gaps.plot([low, high], [place] * 2, color=color)
        gaps.plot(100 * gap["mean"], place, "o", color=color, markersize=4)
    gaps.set_yticks(range(len(rows)), [name for name, _, _ in rows[::-1]])
    gaps.axvline(0, color=LIMIT, linewidth=1)
    gaps.set_xscale("symlog", linthresh=2)
    gaps.set_xticks(ticks := [-50, -10, -2, -1, 0, 1, 2, 10, 50], map(str, ticks))
    gaps.set_xlabel("accuracy less that of csgd, points; line: 95 % interval")
    for place, (system, found) in enumerate(record["settings"]["large"]["systems"].items()):
        if "distances" in found:
            distances.plot(
                *np.array(found["distances"]).T, color=f"C{place}", linewidth=1.2, label=system
            )
    distances.set_yscale("log")
    distances.set_xlabel("steps")
    distances.set_ylabel("consensus distance, setting large")
    distances.legend(fontsize=7, frameon=False)
    return figure


def replication(results: Path) -> Figure:
    """B_S by copies against its closed form; efficiency by batch, with the batch expected."""
    record = read(results / "replication.json")
    title = f"{record['n']:,} samples, of which every r are equal"
    figure, (bound, *curves) = panels_of(1, 3, (11, 3.6), title)
    found = [record["closed_form"][str(copies)] for copies in record["copies"]]
    bound.plot(
        record["copies"], [one["expected"] for one in found], color=OTHERS, label="closed form"
    )
    bound.errorbar(
        record["copies"],
        [one["measured"] for one in found],
        [one["deviation"] for one in found],
        fmt=".",
        color=OURS,
        label="measured, deviation of one draw",
    )
    bound.set(xscale="log", yscale="log", xlabel="copies r", ylabel="B_S at the start")
    bound.set_xticks(record["copies"], map(str, record["copies"]))
    bound.set_yticks(ticks := [200, 300, 400, 600], map(str, ticks))
    bound.minorticks_off()
    bound.legend(fontsize=7, frameon=False)
    for panel, name in zip(curves, ("least_squares", "fashion_mlp_finer"), strict=True):
        case = record[name]
        for place, copies in enumerate(record["copies"]):
            one, color = case[str(copies)], f"C{place}"
            panel.plot(
                case["batches"],
                one["efficiency"],
                ".-",
                color=color,
                linewidth=1.2,
                label=f"r = {copies}",
            )
            panel.plot([one["b80_expected"]], [record["enough"]], "v", color=color, markersize=7)
        panel.axhline(record["enough"], color=LIMIT, linewidth=1)
        panel.set(xscale="log", xlabel="batch", title=name.removesuffix("_finer").replace("_", " "))
        panel.legend(fontsize=7, frameon=False)
    curves[0].set_ylabel("efficiency; triangle: B80 expected")
    return figure


def critical_batch(results: Path) -> Figure:
    """Iterations by batch and by delay beside the laws; hpctrain's rule beside the best step."""
    record = read(results / "critical_batch.json")
    title = "Interpolating least squares: iterations to 1/1000 of the first loss, best step size"
    figure, (batches, delays, rules) = panels_of(1, 3, (12, 3.8), title)
    shown = {"blocks": ("M = 31 at every w", OURS), "gaussian": ("Gaussian rows", INK)}
    for name, (label, color) in shown.items():
        problem = record["problems"][name]
        noise = statistics.fmean(problem["M"]["at_target"])
        for panel, other, law in (
            (batches, "delay", lambda x, m=noise: 1 + m / x),
            (delays, "batch", lambda x, m=noise: 1 + m + x),
        ):
            key = "batch" if other == "delay" else "delay"
            rows = [r for r in problem["rows"] if r[other] == (0 if other == "delay" else 1)]
            places = np.array([row[key] for row in rows], float)
            counts = np.array([row["iterations"] for row in rows])
            panel.plot(places, counts, "o", color=color, markersize=3)
            curve = law(places)
            scale = np.exp(np.log(counts.mean(1) / curve).mean())
            panel.plot(places, scale * curve, color=color, linewidth=1, label=label)
            panel.axvline(noise, color=color, linewidth=0.8, linestyle=":")
    batches.set_xscale("log", base=2)
    batches.set_title("lines: 1 + M/B; dotted: B = M", fontsize=10)
    batches.set_xlabel("batch, no delay")
    delays.set_title("lines: 1 + M + delay; dotted: delay = M", fontsize=10)
    delays.set_xlabel("delay, one sample a step")
    kinds = {"rule": ("from the best step at B = 1", LIMIT), "rule_from_theorem":
             ("from 1 / (L (1 + M))", OURS), "rule_twice_the_delay":
             ("the delay counted twice", INK)}  # fmt: skip
    rows = [r for r in record["problems"]["blocks"]["rows"] if r["batch"] == 1]
    for key, (label, color) in kinds.items():
        found = [
            (row["delay"], statistics.fmean(c / b for c, b in zip(row[key], row["iterations"],
             strict=True))) for row in rows if None not in row[key]
        ]  # fmt: skip
        rules.plot(*np.array(found).T, "o-", color=color, markersize=3, linewidth=1, label=label)
        lost = [row["delay"] for row in rows if None in row[key]]
        rules.plot(lost, [6.5] * len(lost), "x", color=color)
    for panel in (delays, rules):
        panel.set_xscale("symlog", base=2, linthresh=2)
        panel.set_xticks(ticks := [0, 2, 8, 32, 128], map(str, ticks))
        panel.set_xlim(-0.3, 340)
    rules.set(xlabel="delay, one sample a step", yscale="log", ylim=(0.9, 7.5))
    rules.set_yticks(ticks := [1, 1.5, 2, 3, 4, 6], map(str, ticks))
    rules.minorticks_off()
    rules.set_title('[lr] "stich", M = 31, over best; x: diverges', fontsize=10)
    for panel in (batches, delays):
        panel.set_yscale("log")
    batches.set_ylabel("iterations")
    for panel in (batches, delays, rules):
        panel.legend(fontsize=7, frameon=False)
    return figure


def batch_policies(results: Path) -> Figure:
    """Per task: seconds to the target by fixed batch and by policy; the policy's batches."""
    tasks = read(results / "batch_policies.json")["tasks"]
    title = "Time to a common loss, 4 nodes x 1 rank at 1 Gbit/s (dotted: misses it)"
    figure, panels = panels_of(2, len(tasks), (3.1 * len(tasks), 5.6), title)
    kinds = {"AdaBatch": "C1", "DiveBatch": "C2", "goodput": OURS}
    for column, (task, found) in enumerate(tasks.items()):
        above, below = panels[column], panels[len(tasks) + column]
        swept = {
            int(name.split()[1]): one
            for name, one in found["methods"].items()
            if one["family"] == "fixed" and all(one["reached"])
        }
        above.plot(
            list(swept), [one["mean_s"] for one in swept.values()], "o-", color=INK, markersize=3
        )
        for family, color in kinds.items():
            mine = [one for one in found["methods"].values() if one["family"] == family]
            if not mine:
                continue
            best = min(mine, key=lambda one: (not all(one["reached"]), one["mean_s"]))
            style = "-" if all(best["reached"]) else ":"
            above.axhline(best["mean_s"], color=color, linestyle=style, label=family)
            batches = [[d["samples"] / 1000, d["batch_global"]] for d in best["plan"]]
            batches.append([best["samples"][0] / 1000, batches[-1][1]])
            samples, taken = zip(*batches, strict=True)
            below.step(samples, taken, where="post", color=color, label=family)
        above.set_xscale("log", base=2)
        above.set_yscale("log")
        above.set_xlabel("fixed batch")
        above.set_title(task)
        below.set_yscale("log", base=2)
        below.set_xlabel("thousands of samples")
    panels[0].set_ylabel("seconds to the target")
    panels[len(tasks)].set_ylabel("batch, seed 0")
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def noise_scale(results: Path) -> Figure:
    """The measured B_S, and DiveBatch's, over the whole training set's."""
    problems = read(results / "noise_scale.json")["problems"]
    title = "Measured B_S over the whole training set's: median and range of all trials"
    figure, panels = panels_of(1, len(problems), (12, 3.2), title, sharey=True)
    kinds = {
        "over_truth": (OURS, "groups, where resolved"),
        "divebatch_over_truth": (LIMIT, "DiveBatch"),
    }
    for panel, (name, found) in zip(panels, problems.items(), strict=True):
        panel.axhspan(0.5, 2.0, color=OTHERS, alpha=0.35, linewidth=0)
        for aside, (key, (color, label)) in zip((-0.08, 0.08), kinds.items(), strict=True):
            for place, point in enumerate(found["checkpoints"]):
                if spread := point.get(key):
                    panel.plot([place + aside] * 2, [spread["min"], spread["max"]], color=color)
                    dot = (place + aside, spread["median"])
                    panel.plot(*dot, "o", color=color, markersize=4, label=label)
                    label = "_"
        ticks = [f"{p['step']}\n{p['resolved']:.0%}" for p in found["checkpoints"]]
        panel.set_xticks(range(len(ticks)), ticks)
        panel.set_xlim(-0.5, len(ticks) - 0.5)
        panel.set_yscale("log")
        panel.set_xlabel("step; trials resolved")
        panel.set_title(f"{name}, B = {found['batch']}", fontsize=10)
    panels[0].legend(fontsize=7, frameon=False, loc="upper left")
    return figure


def flagship(results: Path) -> Figure:
    """Bytes of a step with each axis switched off; accuracy against seconds where it is known."""
    record = read(results / "flagship.json")
    variants = record["variants"]
    curves = {name: found for name, found in variants.items() if found.get("curves")}
    title = "configs/flagship.toml, and each of its axes switched off"
    count = 2 if curves else 1
    figure, panels = panels_of(1, count, (5.5 * count, 2.8), title)
    panels[0].set_xscale("log")
    panels[0].set_xlim(0.1, 100.0)
    sent = {name: [found["bytes_per_node"]["4 x 2"] / 1e6] for name, found in variants.items()}
    bars(panels[0], sent, "{:.2f}".format)
    panels[0].set_xlabel("MB that a node sends per step, 4 nodes x 2 ranks")
    for place, (name, found) in enumerate(curves.items()):
        for seed, curve in enumerate(found["curves"]):
            panels[1].plot(
                *zip(*curve, strict=True),
                color=OURS if place == 0 else f"C{place}",
                linewidth=1.6 if place == 0 else 0.9,
                label=name if seed == 0 else None,
            )
    if curves:
        target = Target.parse(record["target"]).value
        panels[1].axhline(target, color=LIMIT, linewidth=0.8)
        panels[1].set(xscale="log", ylim=(target - 0.1, target + 0.02))
        panels[1].set_xlabel(f"seconds, links of {record['rate']}")
        panels[1].set_ylabel("held-out accuracy")
        panels[1].legend(fontsize=7, frameon=False)
    return figure


def read(path: Path) -> Record:
    record: Record = json.loads(path.read_text())
    return record


def plasticity(results: Path) -> Figure:
    """Accuracy over a task, task by task: mean over seeds, and every seed."""
    records = [read(results / f"{name}.json") for name in ("plasticity", "plasticity_names")]
    title = "MNIST, labels permuted before every task, SGD: accuracy while a task is learned (%)"
    figure, panels = panels_of(1, len(records) + 1, (12, 3.8), title)
    colors = {"none": LIMIT, "l2": OTHERS, "spectral": OURS, "wasserstein": INK}
    titles = ("labels permuted over the images", "names of the digits permuted")
    for panel, record, text in zip(panels, records, titles, strict=False):
        for method, chosen in record["optimisers"]["sgd"]["methods"].items():
            each = np.array([run["during"] for run in chosen["runs"]])
            tasks = np.arange(each.shape[1])
            panel.plot(tasks, each.T, color=colors[method], linewidth=0.4, alpha=0.6)
            label = f"{method}, lr {chosen['lr']:g}"
            label += f", {chosen['strength']:g}" if chosen["strength"] else ""
            panel.plot(tasks, each.mean(0), color=colors[method], linewidth=1.6, label=label)
        panel.set_title(text, fontsize=10)
        panel.legend(fontsize=7, frameon=False, loc="lower left")
    for method, chosen in records[0]["optimisers"]["sgd"]["methods"].items():
        each = np.array([run["grad_erank"] for run in chosen["runs"]])
        panels[-1].plot(np.arange(each.shape[1]), each.mean(0), color=colors[method])
    panels[-1].set_title("grad_erank before a task's first step, as left", fontsize=10)
    for panel in panels:
        panel.set_xlabel("permutations so far")
    return figure


def width_depth(results: Path) -> Figure:
    """B_S and the critical batch by depth, and one against the other."""
    record = read(results / "width_depth.json")
    title = "Digits, 8,000 parameters: what batch a shape bears; dots: seeds"
    figure, panels = panels_of(1, 3, (11, 3.6), title)
    for panel, activation in zip(panels, ("linear", "relu"), strict=False):
        shapes = [row for row in record["shapes"] if row["activation"] == activation]
        depths = [row["depth"] for row in shapes]
        labels = {"b_s": "B_S on the way", "critical": "critical batch", "b50": "B50"}
        for (key, label), color in zip(labels.items(), (OURS, LIMIT, OTHERS), strict=True):
            means = [statistics.fmean(row[key]) for row in shapes]
            panel.plot(depths, means, marker="o", color=color, linewidth=1.2, label=label)
            for depth, row in zip(depths, shapes, strict=True):
                panel.plot([depth] * len(row[key]), row[key], ".", color=color, alpha=0.4)
        panel.set(xscale="log", yscale="log", title=activation, xlabel="hidden layers")
        panel.set_xticks(depths, [f"{row['depth']}\n({row['width']})" for row in shapes])
        panel.set_xticks([], minor=True)
        panel.legend(fontsize=7, frameon=False)
    for activation, color in (("linear", OURS), ("relu", INK)):
        shapes = [row for row in record["shapes"] if row["activation"] == activation]
        pairs = [
            (statistics.fmean(row["b_s"]), statistics.fmean(row["critical"])) for row in shapes
        ]
        panels[2].plot(*np.array(pairs).T, "o", color=color, label=activation)
        for row, pair in zip(shapes, pairs, strict=True):
            panels[2].annotate(str(row["depth"]), pair, (4, 2), textcoords="offset points")
    panels[2].set(xscale="log", yscale="log", xlabel="B_S on the way", ylabel="critical batch")
    low, high = panels[2].get_xlim()
    panels[2].plot([low, high], [low, high], color=LIMIT, linewidth=0.8)
    panels[2].set_title("number: hidden layers; line: equal", fontsize=10)
    panels[2].legend(fontsize=7, frameon=False)
    return figure


def mechanisms(results: Path) -> Figure:
    """Measured B_S against the predicted one."""
    record = read(results / "mechanisms.json")
    title = "Diversity-inducing mechanisms: B_S, predicted and measured"
    figure, panels = panels_of(1, len(record["stages"]), (11, 3.8), title)
    colors = {"langevin": OURS, "quantise": INK, "dropout": "C2", "one mask": LIMIT}
    for panel, stage in zip(panels, record["stages"], strict=True):
        rows = stage["rows"]
        for mechanism, color in colors.items():
            found = [row for row in rows if row["mechanism"] == mechanism]
            panel.plot(
                [row["predicted"] for row in found],
                [row["measured"] for row in found],
                "x" if mechanism == "one mask" else "o",
                color=color,
                label=mechanism,
            )
        ends = [min(row["b_s_of_means"] for row in rows), max(row["predicted"] for row in rows)]
        panel.plot(ends, ends, color=OTHERS, linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel="predicted")
        panel.set_title(f"after {stage['steps']} steps; without: {stage['b_s']:.1f}", fontsize=10)
        panel.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel("measured")
    return figure


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "allreduce": allreduce,
    "selection": selection,
    "sparse_exchange": sparse_exchange,
    "never_slower": never_slower,
    "density": density,
    "time_to_target": time_to_target,
    "replicas": partial(time_to_target, record="replicas.json"),
    "straggler": straggler,
    "non_iid": non_iid,
    "decentralised": decentralised,
    "replication": replication,
    "critical_batch": critical_batch,
    "batch_policies": batch_policies,
    "noise_scale": noise_scale,
    "flagship": flagship,
    "plasticity": plasticity,
    "width_depth": width_depth,
    "mechanisms": mechanisms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    for name in args.names or FIGURES:
        figure = FIGURES[name](args.results)
        figure.savefig(args.out / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
