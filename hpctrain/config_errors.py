"""Configuration mistakes in one line each: file, table, key, what is allowed, the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from hpctrain.toml_text import toml_value
from hpctrain.user_code import CUSTOM

Tree = dict[str, Any]
KeyPath = tuple[str | int, ...]


def explain(
    error: Any, root: type[BaseModel], tree: Tree, label: str, origins: Mapping[KeyPath, str]
) -> str:
    """One pydantic error as a line for the person who wrote the file. Local.

    Args:
        error: An entry of `ValidationError.errors()`.
        root: The model that was validated.
        tree: What was validated.
        label: The configuration's name, where no layer set the key.
        origins: The layer that set each key.
    """
    where, owner = locate(root, tree, error["loc"])
    origin = next(
        (origins[where[:n]] for n in range(len(where), 0, -1) if where[:n] in origins), label
    )
    dotted = ".".join(str(part) for part in where)
    given = error["input"]
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            allowed = sorted(owner.model_fields) if owner else []
            return f"{origin}: unknown key {dotted}{nearest(str(where[-1]), allowed)}"
        case "missing":
            return f"{origin}: {'table' if len(where) == 1 else 'key'} {dotted} is missing"
        case "literal_error":
            expected = str(error["ctx"]["expected"]).replace(" or ", ", ").replace("'", "")
            return f"{origin}: {dotted} = {toml_value(given)}{nearest(given, expected.split(', '))}"
        case "union_tag_not_found" | "model_type" if not isinstance(given, Mapping):
            return f"{origin}: {dotted} = {toml_value(given)}: must be a table, [{dotted}]"
        case "union_tag_not_found":
            kinds = [_tag(model) for model in _models(root.model_fields[str(where[0])].annotation)]
            return f"{origin}: {dotted}.kind is missing (allowed: {', '.join(kinds)})"
        case "union_tag_invalid":
            tags = str(error["ctx"]["expected_tags"]).replace("'", "").split(", ")
            return f"{origin}: {dotted}.kind = {toml_value(given['kind'])}" + nearest(
                given["kind"], tags
            )
        case "value_error" if isinstance(given, dict | BaseModel):
            return f"{origin}: {f'[{dotted}] ' if dotted else ''}{message}"
    rule = message.replace("Input should", "must", 1)
    return f"{origin}: {dotted} = {toml_value(given)}: {rule}"


def nearest(given: object, allowed: Sequence[str]) -> str:
    """The end of a message about a name that is not among `allowed`. Local."""
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return f"{hint} (allowed: {', '.join(allowed)})"


def locate(
    root: type[BaseModel], tree: Tree, loc: Sequence[str | int]
) -> tuple[KeyPath, type[BaseModel] | None]:
    """The key path of a pydantic location, without union tags, and the model that owns its key."""
    owner: type[BaseModel] | None = root
    tags: list[str] = []
    models: list[type[BaseModel]] = []
    node: Any = tree
    path: list[str | int] = []
    for position, part in enumerate(loc):
        if part in tags and not (isinstance(node, Mapping) and part in node):
            continue  # a union tag, already used to choose `owner`
        path.append(part)
        if isinstance(part, int):  # one of a list of tables, whose models are known
            node = node[part] if isinstance(node, list) and part < len(node) else None
        else:
            node = node.get(part) if isinstance(node, Mapping) else None
            if position < len(loc) - 1 and owner is not None and part in owner.model_fields:
                models = list(_models(owner.model_fields[part].annotation))
        if position < len(loc) - 1 and models and not isinstance(node, list):
            tags = [_tag(model) for model in models]
            kind = node.get("kind") if isinstance(node, Mapping) else None
            tag = CUSTOM if isinstance(kind, str) and ":" in kind else kind
            chosen = [m for m in models if _tag(m) == tag] or models[:1]
            owner = chosen[0] if chosen else None
            models = []
    return tuple(path), owner


def _tag(model: type[BaseModel]) -> str:
    """What stands for a member of a union in pydantic's locations."""
    field = model.model_fields.get("kind")
    if field is None:
        return ""
    return CUSTOM if field.is_required() else str(field.default)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models(part)
