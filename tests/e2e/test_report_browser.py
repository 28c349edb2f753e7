"""The report in a real browser, from a file, with no network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from megatron_distil.report import write_report
from tests.finished_run import ATTACK, write_run

WITHOUT_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs browser: there is no Chromium on this machine")


def opened(page: Path, scratch: Path, *flags: str) -> tuple[str, str, list[str]]:
    """The document after its script ran, the browser's console, and the addresses that it asked for."""
    net_log = scratch / "net.json"
    done = subprocess.run(
        [
            BROWSER or "",
            "--headless=new",
            "--no-sandbox",  # its own refuses to run as root, and containers often have no other user
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--no-default-browser-check",
            f"--user-data-dir={scratch / 'profile'}",
            f"--log-net-log={net_log}",
            "--enable-logging=stderr",
            "--virtual-time-budget=4000",
            *flags,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console, requests(net_log)


def requests(net_log: Path) -> list[str]:
    """Addresses of the requests of the page: the browser's own services are left out by their initiator."""
    text = net_log.read_text(encoding="utf-8")
    try:
        events = json.loads(text)["events"]
    except ValueError:  # the browser ended before it closed the list
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    found = [event["params"] for event in events if "url" in event.get("params", {})]
    return [one["url"] for one in found if str(one.get("initiator", "")).startswith(("file", "null"))]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    write_run(tmp_path / "roads sum")
    write_run(tmp_path / "roads_mean", future="mean")
    with (tmp_path / "roads_mean" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss/ce')  # a run that is being written
    write_report([tmp_path / "roads sum", tmp_path / "roads_mean"], out := tmp_path / "page.html")
    return out


def test_the_page_draws_itself_without_an_error_or_a_request(page: Path, tmp_path: Path):
    document, console, asked = opened(page, tmp_path)
    assert console == ""
    assert asked == []
    assert 'data-ready="true"' in document
    assert document.count("<svg") > 10
    assert len(re.findall(r'class="line" d="M[0-9.]+ [0-9.]+L', document)) > 10
    text = unescape(re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", document, flags=re.DOTALL))
    for expected in (
        "Before and after",
        "roads sum",
        "distil, mean credit, frozen teacher",
        "25.0 % \u2192",
        "75.0 %",
        "Prediction and measurement",
        "predicted 0.933",
        "predicted 0.788",
        "Where the time goes",
        "6.3 % lie outside the main phases",
        "eval/first_road_share",
        "sync/logprob_gap_nats",
        "objective.future",
    ):
        assert expected in text, expected


def test_a_rollout_is_shown_as_text_and_never_run(page: Path, tmp_path: Path):
    document, _, _ = opened(page, tmp_path)
    assert "<title>roads sum, roads_mean - DistIL report</title>" in document
    assert "<img" not in document
    assert re.search(r'<mark title="not in the prompt">\?538</mark>', document)
    assert document.count("<script") == 2
    assert ATTACK not in document


def test_the_checks_for_errors_and_requests_can_fail(page: Path, tmp_path: Path):
    text = page.read_text().replace("<body>", '<body><img src="http://127.0.0.1:9/x.png">')
    page.write_text(text)
    _, console, asked = opened(page, tmp_path)
    assert "Content Security Policy" in console
    assert asked == []
    page.write_text(WITHOUT_POLICY.sub("", text))
    _, _, asked = opened(page, tmp_path)
    assert "http://127.0.0.1:9/x.png" in asked


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(page: Path, tmp_path: Path, width: int):
    # The page measures itself: the policy allows no script but its own, so the probe rides in a copy without one.
    text = WITHOUT_POLICY.sub("", page.read_text())
    probe = (
        "<script>setTimeout(() => { const wide = document.documentElement;"
        "wide.dataset.overflow = String(wide.scrollWidth - wide.clientWidth); }, 1500);</script></body>"
    )
    page.write_text(text.replace("</body>", probe))
    document, _, _ = opened(page, tmp_path, f"--window-size={width},900")
    assert re.findall(r'data-overflow="(\d+)"', document) == ["0"]
