"""The description of the service, held against what is seen of it."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs

FILE = Path(__file__).resolve().parents[1] / "sandbox" / "openapi.json"


@cache
def description() -> Any:
    return json.loads(FILE.read_text())


def check(method: str, path: str, status: int, body: Any) -> None:
    """Fail if this exchange is not described."""
    operation = _operation(method, path)
    if operation is None:
        assert status in (404, 405), f"{method} {path} is served, and not described"
        if method != "HEAD":
            check_schema("Refusal", body)
        return
    assert str(status) in operation["responses"], f"{method} {path}: status {status} is not described: {body}"
    content = _resolved(operation["responses"][str(status)]).get("content", {})
    for kind, media in content.items():
        if kind == "application/json":
            _validator(json.dumps(media["schema"])).validate(body)


def check_schema(name: str, body: Any) -> None:
    """Fail if a value is not of a schema of the description."""
    _validator(json.dumps({"$ref": f"#/components/schemas/{name}"})).validate(body)


def _operation(method: str, path: str) -> Any:
    for template, item in description()["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]*", template), path):
            return item.get(method.lower())
    return None


def _resolved(value: Any) -> Any:
    if "$ref" not in value:
        return value
    found: Any = description()
    for step in value["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    return found


@cache
def _validator(schema: str) -> Any:
    whole = {**json.loads(schema), "components": description()["components"]}
    return jsonschema_rs.validator_for(whole)
