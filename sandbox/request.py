"""A request to run a program, checked. Everything that is wrong with it is wrong for ever: the client must not repeat it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from sandbox import feedback, judge
from sandbox import limits as limits_
from sandbox.refusal import BadRequest, TestsUnknown, TooLarge

PROTOCOL = 1
MODES = ("stdin", "functional")
MAX_TESTS = 1000
MAX_ID_CHARS = 200
MAX_DEADLINE_S = 86400.0
MAX_FEEDBACK_CHARS = 100_000
_FIELDS = {
    *("protocol", "id", "language", "code", "mode", "fn", "tests", "tests_ref", "limits", "stop_after", "prelude"),
    *("stop_after_timeouts", "profile", "feedback", "deadline_s", "cancel_on_disconnect"),
}


class Test(NamedTuple):
    """One run of the program."""

    input: str
    output: str | None
    """What is compared with; None: nothing."""


@dataclass(frozen=True)
class TestSet:
    """Tests, checked once and used by many requests."""

    __test__ = False  # not a test of pytest

    rows: tuple[Test, ...]
    digest: str
    size: int
    """Characters."""

    @cached_property
    def broken_json(self) -> str:
        """The first output that is not JSON, which functional tests need; empty if there is none."""
        for index, test in enumerate(self.rows):
            try:
                json.loads(test.output or "null")
            except (ValueError, RecursionError) as error:
                return f"tests[{index}].output: not JSON, which functional tests need: {error}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What this service takes."""

    ceilings: Mapping[str, float] = field(default_factory=lambda: limits_.CEILINGS)
    max_tests: int = MAX_TESTS
    languages: Mapping[str, str] = field(default_factory=lambda: {"python": ""})
    """Name -> why it does not run here; empty: it does."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One program and its tests."""

    id: str
    """Says that two requests are the same attempt; the digest if the client gave none."""
    digest: str
    """Of all that decides the answer."""
    language: str
    code: str
    mode: str
    function: str
    tests: tuple[Test, ...]
    limits: Mapping[str, float]
    stop_after: int
    """Failed tests after which the rest is not run."""
    stop_after_timeouts: int
    """Of those, tests that ended at a limit of time: each of them takes all the time that a test may take."""
    has_prelude: bool
    profile: str
    feedback: feedback.Options
    deadline_s: float | None
    """For all, queue included."""
    cancel_on_disconnect: bool
    size: int
    """Characters that wait with it."""
    received: float = field(default_factory=time.monotonic, compare=False)

    @property
    def deadline(self) -> float | None:
        """By ``time.monotonic``."""
        return None if self.deadline_s is None else self.received + self.deadline_s


def _not_stored(_: str) -> TestSet | None:
    return None


def decode(data: bytes) -> Any:
    """A body that came over the wire.

    Raises:
        BadRequest: it is not JSON, or an object has a key twice.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"body: not JSON: {error}") from error


def parse(body: Any, rules: Rules | None = None, stored: Callable[[str], TestSet | None] = _not_stored) -> Request:
    """Check a decoded body.

    Args:
        body: of ``/v1/run``.
        rules: of this service.
        stored: finds uploaded tests by their hash.

    Raises:
        BadRequest: names the field, the value and what would be right.
        TooLarge: more tests than are taken.
        TestsUnknown: ``tests_ref`` is not there.
    """
    rules = rules or Rules()
    _need(isinstance(body, dict), "body", f"{_shown(body)} is not a JSON object")
    _need_known(body, _FIELDS, "")
    _need(body.get("protocol", PROTOCOL) == PROTOCOL, "protocol", f"{_shown(body.get('protocol'))} is not {PROTOCOL}")
    language = _language(body.get("language", "python"), rules)
    code, function = body.get("code"), body.get("fn") or ""
    _need(isinstance(code, str), "code", f"{_shown(code)} is not a string")
    mode = _choice(body, "mode", MODES, "stdin")
    tests = _tests_of(body, rules, stored)
    if mode == "functional":
        _need(language == "python", "mode", f"'functional' is for python; {language} programs read their input")
        is_name = isinstance(function, str) and function.isidentifier()
        _need(is_name, "fn", f"{_shown(function)} is not an identifier, such as 'solve'")
        if tests.broken_json:  # a broken test is ours, never a wrong answer
            raise BadRequest(tests.broken_json)
    profile = _choice(body, "profile", judge.PROFILES, "native")
    _need(profile != "lcb" or language == "python", "profile", f"'lcb' is for python; for {language} take 'native'")
    own = {name: min(value, rules.ceilings[name]) for name, value in judge.PROFILE_LIMITS[profile].items()}
    given = {**own, **_limits(body.get("limits", {}), rules.ceilings)}
    limits = limits_.complete(given, rules.ceilings)
    stop_after = _positive(body.get("stop_after", len(tests.rows)), "stop_after")
    timeouts = _positive(body.get("stop_after_timeouts", len(tests.rows)), "stop_after_timeouts")
    prelude = _flag(body, "prelude", True)
    options = _feedback(body.get("feedback", {}), profile)
    content = [language, code, mode, function, tests.digest, sorted(limits.items()), stop_after, prelude]
    digest = hashlib.sha256(json.dumps([*content, timeouts, profile, options]).encode()).hexdigest()
    key = body.get("id", digest)
    is_key = isinstance(key, str) and 0 < len(key) <= MAX_ID_CHARS
    _need(is_key, "id", f"{_shown(key)} is not a string of 1 to {MAX_ID_CHARS} characters")
    return Request(
        id=key,
        digest=digest,
        language=language,
        code=code,
        mode=mode,
        function=function,
        tests=tests.rows,
        limits=limits,
        stop_after=stop_after,
        stop_after_timeouts=timeouts,
        has_prelude=prelude,
        profile=profile,
        feedback=options,
        deadline_s=_deadline(body.get("deadline_s")),
        cancel_on_disconnect=_flag(body, "cancel_on_disconnect", False),
        size=len(code) + (tests.size if "tests" in body else 0),
    )


def parse_tests(value: Any, max_tests: int = MAX_TESTS) -> TestSet:
    """Check a decoded array of tests.

    Raises:
        BadRequest: names the test, the value and what would be right.
        TooLarge: there are too many.
    """
    _need(isinstance(value, list) and value, "tests", f"{_shown(value)} is not a list of 1 to {max_tests} objects")
    if len(value) > max_tests:
        raise TooLarge(f"tests: {len(value)} are more than the {max_tests} that this service takes (--max-tests)")
    rows: list[Test] = []
    for index, row in enumerate(value):
        where = f"tests[{index}]"
        _need(isinstance(row, dict), where, f"{_shown(row)} is not an object with input and output")
        _need_known(row, {"input", "output"}, f"{where}.")
        given, output = row.get("input"), row.get("output")
        _need(isinstance(given, str), f"{where}.input", f"{_shown(given)} is not a string")
        _need(output is None or isinstance(output, str), f"{where}.output", f"{_shown(output)} is not a string or null")
        rows.append(Test(given, output))
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return TestSet(tuple(rows), digest, sum(len(row.input) + len(row.output or "") for row in rows))


def _tests_of(body: dict[str, Any], rules: Rules, stored: Callable[[str], TestSet | None]) -> TestSet:
    ref = body.get("tests_ref")
    if ref is None:
        return parse_tests(body.get("tests"), rules.max_tests)
    _need("tests" not in body, "tests_ref", "it stands beside tests; one of the two is right")
    _need(isinstance(ref, str), "tests_ref", f"{_shown(ref)} is not a string")
    found = stored(ref)
    if found is None:
        raise TestsUnknown(
            f"tests_ref: {ref[:MAX_ID_CHARS]!r} is not stored here; PUT /v1/tests/{{sha256}}, then repeat"
        )
    return found


def _language(value: Any, rules: Rules) -> str:
    known = ", ".join(sorted(rules.languages))
    _need(isinstance(value, str) and value in rules.languages, "language", f"{_shown(value)} is not one of {known}")
    why_not = rules.languages[value]
    runs = ", ".join(sorted(name for name, reason in rules.languages.items() if not reason))
    _need(not why_not, "language", f"{value!r} does not run here: {why_not}; these do: {runs}")
    return value


def _limits(value: Any, ceilings: Mapping[str, float]) -> dict[str, float]:
    _need(isinstance(value, dict), "limits", f"{_shown(value)} is not an object")
    _need_known(value, limits_.DEFAULTS, "limits.")
    for name, number in value.items():
        where = f"limits.{name}"
        kinds, kind = ((int,), "a whole number") if limits_.is_whole(name) else ((int, float), "a number")
        _need(type(number) in kinds and number == number, where, f"{_shown(number)} is not {kind}")
        least, most = limits_.FLOORS[name], ceilings[name]
        _need(number >= least, where, f"{_shown(number)} is below {least:.12g}, the least there is")
        _need(number <= most, where, f"{_shown(number)} is above this service's ceiling of {most:.12g}")
    return value


def _feedback(value: Any, profile: str) -> feedback.Options:
    _need(isinstance(value, dict), "feedback", f"{_shown(value)} is not an object")
    _need_known(value, feedback.Options._fields, "feedback.")
    defaults = feedback.Options()
    max_chars = _positive(value.get("max_chars", defaults.max_chars), "feedback.max_chars")
    _need(max_chars <= MAX_FEEDBACK_CHARS, "feedback.max_chars", f"{_shown(max_chars)} is above {MAX_FEEDBACK_CHARS}")
    return feedback.Options(
        max_failing=_positive(value.get("max_failing", defaults.max_failing), "feedback.max_failing"),
        max_chars=max_chars,
        show_expected=_flag(value, "show_expected", defaults.show_expected, "feedback."),
        profile=_choice(value, "profile", judge.PROFILES, profile, "feedback."),
        layout=_choice(value, "layout", feedback.LAYOUTS, defaults.layout, "feedback."),
    )


def _deadline(value: Any) -> float | None:
    if value is None:
        return None
    is_right = type(value) in (int, float) and 0 < value <= MAX_DEADLINE_S
    _need(is_right, "deadline_s", f"{_shown(value)} is not a number above 0 and up to {MAX_DEADLINE_S:g}")
    return float(value)


def _choice(body: Mapping[str, Any], name: str, choices: tuple[str, ...], default: str, where: str = "") -> str:
    value = body.get(name, default)
    _need(isinstance(value, str) and value in choices, where + name, f"{_shown(value)} is not one of {choices}")
    return value


def _flag(body: Mapping[str, Any], name: str, default: bool, where: str = "") -> bool:
    value = body.get(name, default)
    _need(isinstance(value, bool), where + name, f"{_shown(value)} is not true or false")
    return value


def _positive(value: Any, where: str) -> int:
    _need(type(value) is int and value > 0, where, f"{_shown(value)} is not a positive integer")
    return value


def _need_known(value: Mapping[str, Any], known: Any, where: str) -> None:
    for name in value:
        _need(name in known, f"{where}{name[:80]}", f"no such field; there are {', '.join(sorted(known))}")


def _need(condition: object, where: str, reason: str) -> None:
    if not condition:
        raise BadRequest(f"{where}: {reason}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise BadRequest(f"{twice[:80]}: the object has it twice; once is right")
    return found


def _shown(value: object) -> str:
    """A value in a message: short, and whatever its depth."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
