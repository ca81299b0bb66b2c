"""Which built-in model goes with which data, and the error for those that do not."""

from __future__ import annotations

from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError


def fitting_kinds(spec: Spec) -> list[str]:
    """The `kind`s of [model] that can be built for `spec`. Local."""
    if spec.task == "language":
        return ["gpt"]
    if spec.input_dtype != "float32":
        return []
    return ["logistic", "mlp", *(["cnn", "resnet20"] if len(spec.input_shape) == 3 else [])]


def require_fit(kind: str, spec: Spec) -> None:
    """Check that the model `kind` can be built for `spec`. Local.

    Raises:
        ConfigError: it cannot; the message says which kinds can.
    """
    kinds = fitting_kinds(spec)
    if kind in kinds:
        return
    shape = "x".join(str(n) for n in spec.input_shape)
    raise ConfigError(
        f'model.kind = "{kind}" does not fit the data: the task is {spec.task}, one sample is '
        f"{spec.input_dtype} {shape}. Models that fit: {', '.join(kinds) or 'none built in'}; "
        'or write your own, model.kind = "package.module:function".'
    )
