"""What a person reads after the work: the page, the closing table on the terminal, and their JSON schema.

Both are drawn from one JSON object, ``report.json``, whose keys ``schema.json`` beside this file describes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from gramian.errors import GramianError


def schema() -> dict[str, Any]:
    """The JSON Schema of the report of ``gramian compress``."""
    read: dict[str, Any] = json.loads(files(__package__).joinpath("schema.json").read_text("utf-8"))
    return read


def validate(report: Mapping[str, Any]) -> None:
    """Check `report` against ``schema()``.

    Raises:
        GramianError: naming the first key that is missing, of the wrong type or not among the known values.
    """
    _check(report, schema(), "report")


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (Mapping,),
    "array": (list, tuple),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def _check(value: Any, rule: Mapping[str, Any], where: str) -> None:
    """Check `value` by the few keywords of JSON Schema that ``schema.json`` uses."""
    if "type" in rule:
        names = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
        # True is an int for Python, not for JSON.
        if not any(
            isinstance(value, _TYPES[name]) and isinstance(value, bool) == (name == "boolean") for name in names
        ):
            expected = " or ".join(names)
            raise GramianError(
                f"{where} is {type(value).__name__} {str(value)[:60]!r}, expected {expected}; see report/schema.json"
            )
    if "enum" in rule and value not in rule["enum"]:
        known = ", ".join(map(repr, rule["enum"]))
        raise GramianError(f"{where} is {value!r}, expected one of {known}; see report/schema.json")
    if (
        "minItems" in rule
        and isinstance(value, list | tuple)
        and not rule["minItems"] <= len(value) <= rule["maxItems"]
    ):
        raise GramianError(f"{where} has {len(value)} items, expected {rule['minItems']}; see report/schema.json")
    if isinstance(value, Mapping):
        missing = [name for name in rule.get("required", ()) if name not in value]
        if missing:
            raise GramianError(f"{where} lacks {', '.join(map(repr, missing))}; see report/schema.json")
        for name, inner in rule.get("properties", {}).items():
            if name in value:
                _check(value[name], inner, f"{where}.{name}")
    if isinstance(value, list | tuple) and "items" in rule:
        for index, item in enumerate(value):
            _check(item, rule["items"], f"{where}[{index}]")
