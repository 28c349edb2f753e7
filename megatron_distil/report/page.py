"""One HTML file that needs nothing else: data, style and script are in it, and the page may load nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from megatron_distil.report.digest import page_data
from megatron_distil.report.read import Run, read_runs


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page of these runs to ``out``.

    Raises:
        DataError: a folder holds no run, or a file is damaged in its middle.
    """
    text = page(read_runs(folders))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def page(runs: Sequence[Run]) -> str:
    """The page as text."""
    style, script = _asset("page.css"), _asset("page.js")
    return Template(_asset("page.html")).substitute(
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'",
        title=_escaped(_title(runs)),
        style=style,
        script=script,
        data=_embedded(page_data(runs)),
    )


def _title(runs: Sequence[Run], shown: int = 4) -> str:
    """The names of the runs; of many, how many there are."""
    more = f" and {len(runs) - shown} more" if len(runs) > shown else ""
    return ", ".join(run.name for run in runs[:shown]) + more


def _asset(name: str) -> str:
    return files("megatron_distil.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Only this very style and script may run: a rollout may contain anything, and is shown."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: object) -> str:
    """JSON that cannot end the element it stands in."""
    return (
        json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
