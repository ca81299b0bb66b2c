"""An `Appraisal` as a person reads it: numbers with their definitions, and what they mean."""

from __future__ import annotations

import math
import textwrap

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpctrain.appraisal import Appraisal
from hpctrain.stats.diversity import Diversity


def show(found: Appraisal, console: Console, *, layers: bool) -> None:
    """Local. Print the table, the layers if asked for, and the meaning in words.

    Args:
        found: What was measured.
        console: Where to.
        layers: Whether each parameter gets a line.
    """
    where = f"{found.checkpoint} (step {found.step:,})" if found.checkpoint else "initial values"
    console.print(f"gradient diversity of {found.source}, {found.ranks}")
    console.print(f"parameters: {where}")
    console.print(_numbers(found))
    if layers:
        console.print(_layers(found.diversity))
    for paragraph in meaning(found.diversity, found.batch_global):
        console.print(textwrap.fill(paragraph, console.width))


def meaning(whole: Diversity, batch_global: int) -> list[str]:
    """What the numbers say, and what they do not. Local, pure.

    Args:
        whole: Of the whole model.
        batch_global: The configuration's.
    """
    b_s = whole.b_s
    if math.isnan(b_s):
        return ["All gradients are zero: there is nothing left to train here."]
    if b_s == math.inf:
        return ["The gradients cancel exactly: a minimum or a saddle, and no batch is too large."]
    if not whole.resolved:
        return [
            f"Not resolved: of the mean gradient of {whole.samples:,} samples, squared, more than "
            f"half is noise. B_S is about {_short(b_s)} or more; take more samples."
        ]
    return [
        "For SGD at these parameters, to first order: with a step size in proportion to the batch, "
        f"a step of B samples has 1 + (B - 1) / B_S times the second moment of B steps of one "
        f"sample. Up to B = {_short(1 + b_s / 10)} that is 10 % more, and such scaling is safe; at "
        f"B = {_short(1 + b_s)} it is twice as much, and beyond that a larger batch hardly "
        f"shortens the way. For this configuration's batch of {batch_global:,} it is "
        f"{1 + (batch_global - 1) / b_s:.3g}.",
        "B_S moves while a model trains, usually up. It says nothing about Adam, nor about how "
        "well the model will do on new data.",
    ]


def _numbers(found: Appraisal) -> Table:
    whole = found.diversity
    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning")
    chosen = "all" if whole.samples == whole.population else f"of {whole.population:,}, at random"
    table.add_row("n", f"{whole.samples:,}", f"training samples measured: {chosen}")
    at_least = "" if whole.resolved else ">= "
    table.add_row("Delta_S", f"{at_least}{whole.delta_s:.4g}", "sum |g_i|^2 / |sum g_i|^2")
    table.add_row("B_S", f"{at_least}{_short(whole.b_s)}", "n Delta_S, the bound on the batch")
    table.add_row("s2", f"{whole.s2:.4g}", "trace of the covariance of one sample's gradient")
    table.add_row("mu2", f"{whole.mu2:.4g}", "squared length of the mean gradient")
    table.add_row("s2 / mu2", f"{at_least}{_short(whole.b_s - 1)}", "simple noise scale, B_S - 1")
    if found.rank is not None:
        table.add_row(
            "grad_erank",
            f"{found.rank:.1f}",
            f"effective rank of {found.rank_samples} gradients (how many directions they use; "
            "another quantity)",
        )
    return table


def _layers(whole: Diversity) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter")
    for heading in ("B_S alone", "share of s2", "share of mu2"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, layer in whole.layers:
        at_least = "" if layer.resolved else ">= "
        shares = [_share(layer.s2, whole.s2), _share(layer.mu2, whole.mu2)]
        table.add_row(name, f"{at_least}{_short(layer.b_s)}", *shares)
    return table


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"


def _short(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.3g}"
