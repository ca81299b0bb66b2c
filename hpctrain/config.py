"""From TOML to a validated `Run`, with the origin of every value and errors that name the place.

Layers, later ones winning: defaults < base < file < --set. A layer that changes a table's `kind`
replaces that table of the layers below, because their keys belong to another method; a layer that
gives one of several alternative keys (`ALTERNATIVES`) takes the others away.
"""

from __future__ import annotations

import difflib
import importlib.resources
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from hpctrain.batch import BatchConfig
from hpctrain.batch.fixed import Fixed
from hpctrain.batch.lr import LrConfig
from hpctrain.config_errors import KeyPath, Tree, explain
from hpctrain.data import DataConfig
from hpctrain.errors import ConfigError
from hpctrain.exchange import ExchangeConfig
from hpctrain.exchange.dense import Dense
from hpctrain.models import ModelConfig
from hpctrain.optimiser import OptimiserConfig, Sgd
from hpctrain.regularise import RegulariserConfig, require_fit
from hpctrain.runs.checkpoint import CheckpointConfig
from hpctrain.runs.record import RecordConfig
from hpctrain.settings import Evaluate, TopologyConfig, Train, Watchdog
from hpctrain.sync import SyncConfig
from hpctrain.table import Table
from hpctrain.toml_text import toml_value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EMBEDDED = "digits.toml"
"""The packaged configuration of a run without a CONFIG argument."""


ALTERNATIVES: dict[KeyPath, tuple[str, ...]] = {
    ("train",): ("epochs", "samples", "steps"),
    ("lr",): ("warmup_epochs", "warmup_samples"),
}
"""Keys of a table of which a run has one."""


class Run(Table):
    """One training run: a field per TOML table."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Names the run folder; letters, digits, '.', '_' and '-'. Default: the file's stem."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of initial parameters, sample order, augmentation and dropout."""
    data: DataConfig
    model: ModelConfig
    optimiser: OptimiserConfig = Sgd()
    lr: LrConfig
    batch: BatchConfig = Fixed(batch_global=128)
    exchange: ExchangeConfig = Dense()
    sync: list[SyncConfig] = []
    """Rules that reconcile parameters, innermost scope first."""
    topology: TopologyConfig = TopologyConfig()
    regulariser: list[RegulariserConfig] = []
    """What is added to the loss or the gradient; each kind once."""
    train: Train
    evaluate: Evaluate = Evaluate()
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()
    watchdog: Watchdog = Watchdog()

    @property
    def needs_noise(self) -> bool:
        """Whether the batch policy or the step size goes by measured gradients. Local."""
        return bool(self.batch.needs & {"noise", "epoch"}) or self.lr.kind == "adascale"

    @model_validator(mode="after")
    def _combinations(self) -> Run:
        self.exchange.require_fit(self.train, self.optimiser)
        require_fit(self.regulariser, self.exchange.gives)
        if self.sync and self.exchange.scope == "world":
            raise ValueError(
                "[[sync]] rules reconcile replicas, and an exchange over all ranks keeps one: set "
                'exchange.kind = "none", or exchange.scope = "node", or drop the rules'
            )
        if not self.sync and self.exchange.scope != "world":
            raise ValueError(
                "without a [[sync]] rule the ranks would train apart for ever; add one, such as "
                '[[sync]] kind = "average", or choose another exchange or scope'
            )
        if self.train.autocast != "off" and self.train.device == "cpu":
            raise ValueError('train.autocast = "bfloat16" needs train.device = "cuda" or "auto"')
        if self.lr.kind == "adascale" and self.optimiser.kind != "sgd":
            raise ValueError(
                f'lr.kind = "adascale" is a rule for optimiser.kind = "sgd"; with '
                f'"{self.optimiser.kind}" set lr.kind = "sqrt"'
            )
        self.batch.require_fit(
            self.train,
            self.lr,
            exact=self.exchange.exact and self.exchange.scope == "world",
            own_pace=any(rule.own_pace for rule in self.sync),
        )
        return self


@dataclass(frozen=True)
class Loaded:
    """A validated run, the merged TOML tree, and where each value came from."""

    run: Run
    tree: Tree
    origins: dict[KeyPath, str]
    source: str

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(dotted key, TOML value, origin) of every resolved value, in table order."""
        for path, value in _leaves(self.run.model_dump(mode="python", exclude_none=True)):
            origin = self._origin(path)
            yield ".".join(str(p) for p in path), toml_value(value), origin

    def _origin(self, path: KeyPath) -> str:
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return "default"


def load(source: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Loaded:
    """Read, merge and validate a configuration. Local; touches neither MPI nor data.

    Args:
        source: A TOML file; None for the embedded digits run.
        overrides: `table.key=value` texts, value in TOML syntax or a bare word.

    Raises:
        ConfigError: With file, table, key, what is allowed and the nearest name.
    """
    if source is None:
        text = importlib.resources.files("hpctrain").joinpath(EMBEDDED).read_text("utf-8")
        label, layers = f"embedded {EMBEDDED}", [(f"embedded {EMBEDDED}", _parse(text, EMBEDDED))]
        stem = Path(EMBEDDED).stem
    else:
        label, layers = str(source), _read_layers(Path(source), [])
        stem = Path(source).stem
    if overrides:
        layers.append(("--set", parse_overrides(overrides)))
    tree: Tree = {}
    origins: dict[KeyPath, str] = {}
    for layer_name, layer in layers:
        _merge(tree, layer, (), layer_name, origins)
    if "name" not in tree:
        tree["name"] = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem) or "run"
    return Loaded(validate(tree, label, origins), tree, origins, label)


def from_mapping(tree: Tree) -> Loaded:
    """Validate a plain dictionary, as `hpctrain.train({...})` takes it. Local.

    Raises:
        ConfigError: As `load`.
    """
    return Loaded(validate(tree, "the given dictionary", {}), tree, {}, "the given dictionary")


def validate(tree: Tree, label: str, origins: dict[KeyPath, str]) -> Run:
    """The tree as a `Run`. Local.

    Raises:
        ConfigError: One line per mistake: file, table, key, what is allowed, nearest name.
    """
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        lines = [explain(e, Run, tree, label, origins) for e in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """`table.key=value` texts as one tree. Local.

    Raises:
        ConfigError: A text is not of that form, or one key is given below a plain value.
    """
    tree: Tree = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f'--set {text}: write table.key=value, as in "--set lr.base=0.1"')
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {text}: {part} was already given as a plain value")
        node[parts[-1]] = _override_value(raw.strip())
    return tree


def file_schema() -> dict[str, Any]:
    """JSON schema of a configuration file: the tables of `Run`, and `base`. Local."""
    schema = Run.model_json_schema()
    base = {"type": "string", "description": "Another file whose values this one starts from."}
    schema["properties"] = {"base": base, **schema["properties"]}
    schema.pop("required", None)
    return schema


def _override_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def _read_layers(path: Path, above: list[Path]) -> list[tuple[str, Tree]]:
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(str(p.name) for p in [*above, resolved])
        raise ConfigError(f"{path}: base files form a circle: {chain}")
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        wanted = f" (base of {above[-1].name})" if above else ""
        near = difflib.get_close_matches(path.name, _neighbours(path), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file{wanted}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    tree = _parse(text, str(path))
    base = tree.pop("base", None)
    if base is None:
        return [(str(path), tree)]
    if not isinstance(base, str):
        raise ConfigError(f'{path}: base must be one file name, as in base = "common.toml"')
    return [*_read_layers(path.parent / base, [*above, resolved]), (str(path), tree)]


def _neighbours(path: Path) -> list[str]:
    try:
        return [p.name for p in path.parent.iterdir() if p.suffix == ".toml"]
    except OSError:
        return []


def _parse(text: str, label: str) -> Tree:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{label}: not valid TOML: {error}") from None


def _merge(tree: Tree, layer: Tree, at: KeyPath, name: str, origins: dict[KeyPath, str]) -> None:
    alternatives = ALTERNATIVES.get(at, ())
    if any(key in layer for key in alternatives):
        for key in alternatives:
            tree.pop(key, None)
            origins.pop((*at, key), None)
    for key, value in layer.items():
        path = (*at, key)
        old = tree.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if "kind" in value and "kind" in old and value["kind"] != old["kind"]:
                old.clear()
                for stale in [key for key in origins if key[: len(path)] == path]:
                    del origins[stale]
            _merge(old, value, path, name, origins)
        elif isinstance(value, dict):
            tree[key] = {}
            _merge(tree[key], value, path, name, origins)
        else:
            tree[key] = value
            origins[path] = name


def _leaves(tree: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(tree, dict) and (tree or not at):
        for key, value in tree.items():
            yield from _leaves(value, (*at, key))
    else:
        yield at, tree
