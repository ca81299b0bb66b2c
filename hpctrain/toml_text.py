"""Writing TOML: the standard library reads it only."""

from __future__ import annotations

from typing import Any

from hpctrain.table import Table


def toml_value(value: Any) -> str:
    """A TOML literal. Local."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return str(value)


def toml_key(key: str) -> str:
    """A bare TOML key where that is legal, else quoted. Local."""
    bare = key.replace("-", "").replace("_", "").isalnum() and key.isascii()
    return key if bare else toml_value(key)


def to_toml(run: Table) -> str:
    """A table of tables as TOML text that reads back to an equal one. Local."""
    top: list[str] = []
    tables: list[str] = []
    for key, value in run.model_dump(mode="python", exclude_none=True).items():
        if isinstance(value, dict):
            body = [f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()]
            tables.append("\n".join([f"[{key}]", *body]))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                body = [f"{toml_key(k)} = {toml_value(v)}" for k, v in item.items()]
                tables.append("\n".join([f"[[{key}]]", *body]))
        else:
            top.append(f"{toml_key(key)} = {toml_value(value)}")
    return "\n\n".join(["\n".join(top), *tables]) + "\n"
