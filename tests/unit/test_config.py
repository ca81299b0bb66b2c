"""Layers, origins, round trips and error texts of the configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.config import Loaded, file_schema, from_mapping, load, parse_overrides
from hpctrain.errors import ConfigError
from hpctrain.toml_text import to_toml, toml_value

MINIMAL = """
[data]
kind = "digits"
[model]
kind = "mlp"
[lr]
base = 0.1
[train]
epochs = 1
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "a.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


def error_of(source: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    return str(caught.value)


def origin(loaded: Loaded, key: str) -> str:
    return next(where for name, _, where in loaded.rows() if name == key)


def test_embedded_run_is_valid_and_uses_horovod():
    run = load(None).run
    assert run.name == "digits"
    assert run.exchange.dense_backend == "horovod"


def test_every_resolved_run_reads_back_equal(write):
    for source in [None, write(MINIMAL)]:
        run = load(source).run
        again = load(write(to_toml(run), "again.toml")).run
        assert again == run


def test_precedence_is_defaults_base_file_set(write, tmp_path):
    write(MINIMAL + "[batch]\nbatch_global = 10\nmicro_batch = 5\n", "base.toml")
    path = write('base = "base.toml"\nseed = 3\n[batch]\nbatch_global = 20\n', "top.toml")
    loaded = load(path, ["lr.base=0.5"])
    assert (loaded.run.batch.batch_global, loaded.run.batch.micro_batch) == (20, 5)
    assert loaded.run.lr.base == 0.5
    assert loaded.run.name == "top"
    assert origin(loaded, "batch.batch_global").endswith("top.toml")
    assert origin(loaded, "batch.micro_batch").endswith("base.toml")
    assert origin(loaded, "lr.base") == "--set"
    assert origin(loaded, "exchange.bucket_mib") == "default"


def test_a_changed_kind_replaces_the_table_of_the_base(write):
    write(MINIMAL.replace('kind = "mlp"', 'kind = "cnn"\nchannels = [4]'), "base.toml")
    path = write('base = "base.toml"\n[model]\nkind = "mlp"\n', "top.toml")
    assert load(path).run.model.kind == "mlp"


def test_circle_of_bases_is_refused(write):
    write('base = "b.toml"', "a.toml")
    assert "circle" in error_of(write('base = "a.toml"', "b.toml"))


def test_missing_file_names_the_nearest(write, tmp_path):
    write(MINIMAL, "digits.toml")
    message = error_of(tmp_path / "digts.toml")
    assert "no such file" in message
    assert "did you mean" in message
    assert "digits.toml" in message


def test_broken_toml_names_file_and_line(write):
    message = error_of(write("[data\n"))
    assert "a.toml" in message
    assert "line 1" in message


CASES = [
    ("[batch]\nbatch_globl = 3", ["a.toml", "batch.batch_globl", 'did you mean "batch_global"']),
    ("[exchnge]\nkind = 'dense'", ["unknown key exchnge", 'did you mean "exchange"']),
    ("[batch]\nbatch_global = 'many'", ["batch.batch_global", '"many"', "integer"]),
    ("[batch]\nbatch_global = 0", ["batch.batch_global", "0", "greater than or equal to 1"]),
    ("[exchange]\nkind = 'densee'", ["exchange.kind", '"densee"', "dense"]),
    ("[exchange]\nwire_dtype = 'float17'", ["exchange.wire_dtype", 'did you mean "float16"']),
    ("[optimiser]\nkind = 'adamm'", ["optimiser", "adamm", "adamw"]),
    ("[checkpoint]\nevery_s = 'soon'", ["checkpoint.every_s", "soon", "30m"]),
    ("[watchdog]\nwarn_s = 60\nabort_s = 10", ["watchdog", "abort_s"]),
]


@pytest.mark.parametrize(("extra", "parts"), CASES)
def test_error_names_file_key_allowed_and_nearest(write, extra, parts):
    message = error_of(write(MINIMAL + extra))
    for part in parts:
        assert part in message, message
    assert "\n" not in message.strip(), "one mistake, one line"


def test_unknown_key_inside_a_chosen_kind_lists_that_kind(write):
    message = error_of(write(MINIMAL.replace('kind = "mlp"', 'kind = "mlp"\nwidth = 3')))
    assert "model.width" in message
    assert "widths" in message


def test_union_tags_do_not_show_in_keys(write):
    path = write(MINIMAL)
    assert ": [optimiser] nesterov" in error_of(path, "optimiser.nesterov=true")
    assert ": [model] " in error_of(path, "model={kind = 'gpt', n_head = 3, d_model = 8}")
    custom = "model={kind = 'a.b:c', args = 3}"
    assert "model.args = 3: must be" in error_of(path, custom)


def test_unknown_kind_lists_the_members(write):
    message = error_of(write(MINIMAL.replace('"mlp"', '"resnet2"')))
    assert "\n" not in message
    assert 'model.kind = "resnet2"; did you mean "resnet20"?' in message
    for member in ("logistic", "mlp", "cnn", "resnet20", "gpt"):
        assert member in message


def test_a_missing_kind_and_a_value_for_a_table_are_told(write):
    assert "model.kind is missing (allowed: logistic, mlp" in error_of(
        write(MINIMAL.replace('kind = "mlp"', "widths = [3]"))
    )
    assert "model = 3: must be a table" in error_of(write(MINIMAL), "model=3")
    assert "train = 3: must be a table" in error_of(write(MINIMAL), "train=3")


def test_two_lengths_in_one_layer_are_refused_and_a_later_layer_replaces_the_length(write):
    path = write(MINIMAL.replace("epochs = 1", "epochs = 1\nsteps = 3"))
    assert "exactly one of epochs, samples, steps" in error_of(path)
    train = load(write(MINIMAL), ["train.steps=3"]).run.train
    assert (train.epochs, train.steps) == (None, 3)


def test_impossible_combinations_are_refused(write):
    path = write(MINIMAL)
    assert "float64" in error_of(path, "train.dtype=float64", "exchange.wire_dtype=float16")
    assert "nccl" in error_of(path, "exchange.dense_backend=nccl", "train.device=cpu")
    assert "autocast" in error_of(path, "train.autocast=bfloat16", "train.device=cpu")


GROWING = ["batch.kind=goodput", "batch.batch_global=64", "batch.batch_max=512"]
DIVERSE = ["batch.kind=divebatch", *GROWING[1:]]
OWN_PACE = 'sync=[{kind = "average", unit = "total_steps"}]'
APART = ["exchange.kind=none", 'sync=[{kind = "average"}]']
ADASCALE = ["lr.kind=adascale", "lr.reference_batch=64"]

BATCH_CASES = [
    (["batch.kind=goodput"], ["batch.batch_max is missing"]),
    ([*GROWING, "batch.batch_max=63"], ["[batch]", "batch_max = 63 is below the start"]),
    ([*GROWING, "batch.measure=off"], ["[batch]", "contradict"]),
    (["batch.kind=goodputt"], ["batch.kind", 'did you mean "goodput"', "normtest"]),
    ([*GROWING, "batch.delta=1"], ["unknown key batch.delta", "efficiency_floor"]),
    ([*DIVERSE, "exchange.kind=topk"], ["divebatch", 'exchange.kind = "dense"', "goodput"]),
    ([*DIVERSE, *APART], ["divebatch", 'exchange.kind = "dense"']),
    ([*DIVERSE, "batch.estimator=oracle", *APART], ["divebatch", 'exchange.kind = "dense"']),
    ([*DIVERSE, "batch.rescale_lr=true", "lr.kind=linear", "lr.reference_batch=64"],
     ["rescale_lr", 'lr.kind = "linear"']),
    ([*GROWING, "exchange.kind=none", OWN_PACE], ["own pace", 'batch.kind = "fixed"']),
    ([*GROWING, "train.steps=9", "lr.schedule=cosine"], ["train.steps", "train.samples"]),
    ([*ADASCALE, "batch.measure=off"], ["adascale", "drop measure"]),
    ([*ADASCALE, "optimiser.kind=adamw"], ["adascale", 'lr.kind = "sqrt"']),
    (["optimiser={momentum = 0.9, half_life_batch = 64}", "exchange.kind=topk"],
     ["half_life_batch", 'exchange.gives = "gradient"']),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "parts"), BATCH_CASES)
def test_a_batch_policy_that_does_not_fit_is_refused(write, overrides, parts):
    message = error_of(write(MINIMAL), *overrides)
    for part in parts:
        assert part in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        [*GROWING, "exchange.kind=topk"],
        [*GROWING, *APART],
        [*GROWING, "train.steps=9"],
        [*DIVERSE, "batch.rescale_lr=true"],
        [*ADASCALE, *GROWING],
        ["exchange.kind=none", OWN_PACE],
        ["batch.kind=replay", "batch.plan=runs/old", "batch.measure=off", *ADASCALE],
        ["optimiser={momentum = 0.9, half_life_batch = 64}"],
    ],
)
def test_a_batch_policy_that_fits_reads_back_equal(write, overrides):
    run = load(write(MINIMAL), overrides).run
    assert load(write(to_toml(run), "again.toml")).run == run


def test_two_mistakes_are_both_told(write):
    message = error_of(write(MINIMAL), "batch.batch_global=0", "lr.bass=1")
    assert len(message.splitlines()) >= 2


def test_overrides_take_toml_values_and_bare_words():
    tree = parse_overrides(["a.b=1", "a.c=[1, 2]", "d=word", 'e="x=y"', "f=true", "g=1e-3"])
    assert tree == {"a": {"b": 1, "c": [1, 2]}, "d": "word", "e": "x=y", "f": True, "g": 1e-3}


@pytest.mark.parametrize("text", ["novalue", "=3", "a..b=1"])
def test_malformed_override_says_the_form(text):
    with pytest.raises(ConfigError, match="table.key=value"):
        parse_overrides([text])


def test_mapping_is_validated_like_a_file():
    tree = {"data": {"kind": "digits"}, "model": {"kind": "mlp"}, "lr": {"base": 0.1},
            "train": {"steps": 2}}  # fmt: skip
    assert from_mapping(tree).run.train.steps == 2
    with pytest.raises(ConfigError, match="table lr is missing"):
        from_mapping({key: tree[key] for key in ("data", "model", "train")})


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_as_a_toml_value(text):
    from hpctrain.config import tomllib

    assert tomllib.loads(f"v = {toml_value(text)}")["v"] == text


def test_schema_describes_every_key_and_allows_base():
    schema = file_schema()
    assert "base" in schema["properties"]
    undocumented = [
        f"{name}.{key}"
        for name, model in schema["$defs"].items()
        for key, entry in model.get("properties", {}).items()
        if "description" not in entry
    ]
    assert not undocumented, f"keys without a help sentence: {undocumented}"
    json.dumps(schema)


def test_check_runs_without_a_launcher(write):
    path = write(MINIMAL)
    done = subprocess.run(
        [sys.executable, "-m", "hpctrain", "check", str(path), "--set", "lr.base=0.2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "good" in done.stdout
    bad = subprocess.run(
        [sys.executable, "-m", "hpctrain", "check", str(path), "--set", "lr.bas=0.2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert bad.returncode == 78
    assert 'did you mean "base"' in bad.stderr
