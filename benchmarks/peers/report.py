"""Tables of `benchmarks.time_to_target` from its log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

from benchmarks.machine import describe_machine
from benchmarks.peers.job import SETTLED_AT, Job
from benchmarks.peers.log import KEYS, Line, Log
from benchmarks.peers.target import Target
from benchmarks.peers.tasks import ALONE_FOR_EVER, DENSE, SYSTEMS, TASKS

Summary = dict[str, Any]


def median(numbers: Sequence[float] | float) -> float:
    """Of a list; a number is its own."""
    if isinstance(numbers, (int, float)):
        return float(numbers)
    return statistics.median(numbers) if numbers else float("nan")


def summarise(log: Log) -> Summary:
    """Per task and number of nodes: each system's steps, seconds of a step, and their product."""
    lines = current(log.lines())
    found: Summary = {"method": "steps to target x median step", "groups": []}
    for task in TASKS:
        mine = [line for line in lines if line["task"] == task]
        places = {(line["ranks"], line["per_node"]) for line in mine if line["ranks"] > 1}
        for ranks, per_node in sorted(places, key=lambda place: (place[1], -place[0])):
            here = [line for line in mine if _belongs(line, ranks, per_node)]
            rates = sorted({line["rate"] for line in here if line["what"] == "shaped"}) or [""]
            for rate in rates:
                target = TASKS[task].target
                made = {name: _system(name, here, rate, target) for name in SYSTEMS}
                systems = {name: system for name, system in made.items() if system}
                for system in systems.values():
                    if DENSE in systems and system["steps_of"] != DENSE:
                        found_final = compare_final(system, systems[DENSE], target)
                        system["final_less_dense"] = found_final
                ceiling = None
                if timed(systems, DENSE) and timed(systems, ALONE_FOR_EVER):
                    ceiling = systems[DENSE]["step_s"] / systems[ALONE_FOR_EVER]["step_s"]
                group = {
                    "task": task,
                    "title": TASKS[task].title,
                    "target": str(target),
                    "ranks": ranks,
                    "per_node": per_node,
                    "place": _place(ranks, per_node),
                    "rate": rate,
                    "parameters": next((x["parameters"] for x in here if "parameters" in x), None),
                    "links": next((x["links"] for x in here if x.get("links")), None),
                    "ceiling": ceiling,
                    "systems": systems,
                }
                found["groups"].append(group)
    found["machine"] = describe_machine()
    return found


def timed(systems: Summary, name: str) -> bool:
    """Whether that system's step was timed."""
    return "step_s" in systems.get(name, {})


def current(lines: Iterable[Line]) -> list[Line]:
    """The newest run of each key whose definitions are today's."""
    newest: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if line["task"] not in TASKS or line["system"] not in SYSTEMS:
            continue
        if Job(**line["job"]).fingerprint() == line["fingerprint"]:
            newest[tuple(line[name] for name in KEYS)] = line
    return list(newest.values())


def _system(name: str, lines: list[Line], rate: str, target: Target) -> Summary | None:
    steps_of = SYSTEMS[name].steps_of or name
    counted = [x for x in lines if _is(x, "steps", steps_of)]
    shaped = [x for x in lines if _is(x, "shaped", name) and x["rate"] == rate]
    ends = [x for x in lines if _is(x, "final", steps_of)]
    if not counted and not shaped and not ends:
        return None
    found: Summary = {"steps_of": steps_of}
    grid: dict[float, list[int | None]] = {}
    for line in sorted(counted, key=lambda x: (x["lr"], x["seed"])):
        grid.setdefault(line["lr"], []).append(target.reached_at(line["curve"]))
    found["reached"] = {f"{lr:g}": steps for lr, steps in grid.items()}
    most = max((len(steps) for steps in grid.values()), default=0)
    means = {
        lr: statistics.mean(s for s in steps if s is not None)
        for lr, steps in grid.items()
        if len(steps) == most and None not in steps
    }
    if means:
        best = min(means, key=lambda lr: means[lr])
        found |= {"best_lr": best, "steps": means[best], "each": grid[best], "seeds": most}
    if evaluated := [x for x in counted if x["curve"]]:
        nearest = min(evaluated, key=lambda x: x["curve"][-1][1])["lr"]
        shown = found.get("best_lr", nearest)
        found["curves"] = [x["curve"] for x in evaluated if x["lr"] == shown]
    if shaped:
        # Replicas meet at few steps, which a median would leave out.
        typical = statistics.fmean if "sync" in SYSTEMS[name].tables else median
        found["step_s_rounds"] = [typical(x["step_s"]) for x in shaped]
        found["step_s"] = typical([s for x in shaped for s in x["step_s"]])
        found["first_10_s"] = median([sum(x["step_s"][:10]) for x in shaped])
        found["steps_timed"] = [x["steps"] for x in shaped]
        links = [median(x["link_bytes"][-(x["steps"] - SETTLED_AT) :]) for x in shaped]
        found["link_bytes_per_step"] = median(links)
        found["load_average"] = [x["load_average"] for x in shaped]
    found |= _ends(ends, target)
    whole = [x for x in lines if _is(x, "full", name) and x["rate"] == rate]
    found["full"] = [_whole(line, target) for line in whole]
    if means and shaped:
        found["time_s"] = found["steps"] * found["step_s"]
    return found


def _ends(lines: list[Line], target: Target) -> Summary:
    """The last evaluation by seed, at the step size with the most seeds, then at the best one.

    A step size at which some seed diverged is none to choose.
    """
    diverged: dict[str, list[int]] = {}
    for line in (x for x in lines if not x["curve"]):
        diverged.setdefault(f"{line['lr']:g}", []).append(line["seed"])
    by_lr: dict[float, dict[int, list[float]]] = {}
    for line in (x for x in lines if f"{x['lr']:g}" not in diverged):
        by_lr.setdefault(line["lr"], {})[line["seed"]] = line["curve"][-1]

    def rank(lr: float) -> tuple[int, float]:
        mean = statistics.mean(point[target.column] for point in by_lr[lr].values())
        return len(by_lr[lr]), mean if target.measure == "accuracy" else -mean

    best = max(by_lr, key=rank, default=None)
    chosen = {} if best is None else by_lr[best]
    return {"final_lr": best, "final": chosen, "final_diverged": diverged}


def _belongs(line: Line, ranks: int, per_node: int) -> bool:
    """Whether a run was made with that many ranks, or would be the same with them."""
    if line["ranks"] == 1:
        return True
    flat = SYSTEMS[line["system"]].flat and line["what"] in ("steps", "final")
    return bool(line["ranks"] == ranks and (line["per_node"] == per_node or flat))


def _place(ranks: int, per_node: int) -> str:
    return f"{ranks // per_node} nodes x {per_node} rank{'s' if per_node > 1 else ''}"


def _is(line: Line, what: str, system: str) -> bool:
    return bool(line["what"] == what and line["system"] == system)


def compare_final(ours: Summary, dense: Summary, target: Target) -> Summary | None:
    """The last evaluation after equal steps, paired by seed: ours less dense.

    Args:
        ours: A system's part of the summary.
        dense: That of the dense float32 sum.
        target: Its measure is the one that is compared: less accuracy is worse, more loss is.

    Returns:
        Mean difference and its one-sided 95 % bound (Student's t) on the worse side.
    """
    seeds = sorted(ours["final"].keys() & dense["final"].keys())
    if len(seeds) < 2:
        return None
    column = target.column
    each = [ours["final"][seed][column] - dense["final"][seed][column] for seed in seeds]
    spread = stats.t.ppf(0.95, len(each) - 1) * statistics.stdev(each) / math.sqrt(len(each))
    mean = statistics.fmean(each)
    worst = mean - spread if target.measure == "accuracy" else mean + spread
    return {"seeds": seeds, "each": each, "mean": mean, "worst_95": worst}


def _whole(line: Line, target: Target) -> Summary:
    """What a training from beginning to end on the virtual cluster took."""
    found: Summary = {name: line[name] for name in ("lr", "seed", "steps", "load_average")}
    steps = [int(point[0]) for point in line["curve"]]
    reached = target.reached_at(line["curve"])
    seconds = None if reached is None else line["curve_s"][steps.index(reached)]
    return found | {"reached": reached, "seconds_to_target": seconds}


def _arrival(whole: Summary) -> str:
    if whole["reached"] is None:
        return "target not reached"
    seconds = f"{whole['seconds_to_target']:,.0f} s"
    return f"target at step {whole['reached']} after {seconds} (evaluations not counted)"


def table(record: Summary) -> str:
    """Markdown: one table per task, number of nodes and rate."""
    texts = []
    for group in record["groups"]:
        ours = [
            s["time_s"]
            for name, s in group["systems"].items()
            if SYSTEMS[name].family == "hpctrain" and "time_s" in s
        ]
        fastest = min(ours, default=None)
        rows = [
            f"{group['title']}; {group['place']}, {group['rate'] or 'not timed'}; "
            f"target {group['target']}",
            "",
            "| | lr | steps (each seed) | step | MB per node and step | time | over ours |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, found in group["systems"].items():
            if "step_s" not in found and (found["steps_of"] != name or not found["reached"]):
                continue  # neither timed here nor counted
            rows.append(f"| {name} | {' | '.join(_cells(found, fastest))} |")
        if group["ceiling"]:
            rows.append(f"\n{_ceiling(group)}")
        for name, found in group["systems"].items():
            for whole in found["full"]:
                rows.append(
                    f"\n{name}, one training on the cluster, lr {whole['lr']:g}, seed "
                    f"{whole['seed']}: {whole['steps']} steps, {_arrival(whole)}."
                )
        for name, found in group["systems"].items():
            if compared := found.get("final_less_dense"):
                rows.append(f"\n{name}, {_final(compared, group['target'])}.")
        texts.append("\n".join(rows))
    return "\n\n".join(texts)


def _ceiling(group: Summary) -> str:
    """What steps without communication would gain over the dense sum, and who comes how near."""
    systems, ceiling = group["systems"], group["ceiling"]
    dense, alone = systems[DENSE], systems[ALONE_FOR_EVER]
    dense_ms, alone_ms = 1e3 * dense["step_s"], 1e3 * alone["step_s"]
    text = (
        f"Ceiling: dense step {dense_ms:,.0f} ms over computing {alone_ms:,.0f} ms = {ceiling:.1f}"
    )
    if "time_s" in dense:
        for name, found in systems.items():
            if "sync" in SYSTEMS[name].tables and "time_s" in found:
                ratio = dense["time_s"] / found["time_s"]
                text += f"; {name} {ratio:.1f}x, {ratio / ceiling:.2f} of it"
    return text + "."


def _final(compared: Summary, target: str) -> str:
    scale, unit = (100, "points") if target.startswith("accuracy") else (1, "nats")
    mean, worst = (scale * compared[name] for name in ("mean", "worst_95"))
    return (
        f"last evaluation after equal steps, less that of the dense sum: mean {mean:+.3f} {unit} "
        f"over {len(compared['seeds'])} paired seeds, 95 % bound {worst:+.3f}"
    )


def _cells(found: Summary, fastest: float | None) -> list[str]:
    lr, steps, step, sent, time, over = [""] * 6
    if "steps" in found:
        lr = f"{found['best_lr']:g}"
        steps = f"{found['steps']:,.0f} ({', '.join(str(s) for s in found['each'])})"
    elif found["reached"]:
        steps = "; ".join(f"lr {lr}: {steps}" for lr, steps in found["reached"].items())
    if "step_s" in found:
        step = f"{1e3 * found['step_s']:,.0f} ms"
        sent = f"{found['link_bytes_per_step'] / 1e6:.2f}"
    if "time_s" in found:
        time = f"{found['time_s']:,.0f} s"
        over = f"{found['time_s'] / fastest:.1f}x" if fastest else ""
    return [lr, steps, step, sent, time, over]
