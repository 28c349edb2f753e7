"""A judge as they are often written: in the program's process, with the answer in a variable. Every hack works on it."""

from __future__ import annotations

from sandbox.judge import Record
from tests.attacks.attack import Attack

_HARNESS = """
import json, os, pickle, sys, types

judge = sys.modules["judge"] = types.ModuleType("judge")
judge.EXPECTED = {expected!r}
judge.same = lambda got, expected: got == expected

def check_function(code, input, expected):
    names = {{"__name__": "solution"}}
    exec(compile(code, "solution.py", "exec"), names)
    got = names[{fn!r}](*map(json.loads, input.split("\\n")))
    try:
        got = pickle.loads(pickle.dumps(got))
    except Exception:
        pass
    return judge.same(got, expected) or got == expected or json.dumps(got) == json.dumps(expected)

def check_output(code, expected):
    import io
    sys.stdout = out = io.StringIO()
    try:
        exec(compile(code, "solution.py", "exec"), {{"__name__": "__main__"}})
    finally:
        sys.stdout = sys.__stdout__
    print(out.getvalue())
    from decimal import Decimal
    lines = out.getvalue().split("\\n")
    return all(judge.same(a, b) or numbers(Decimal, a, b) for a, b in zip(lines, expected.split("\\n")))

def numbers(Decimal, got, expected):
    try:
        return Decimal(got) == Decimal(expected)
    except ArithmeticError:
        return False

def main():
    expected = {expected!r}
    try:
        if {mode!r} == "stdin":
            solved = check_output({code!r}, expected)
        else:
            expected = json.loads(expected)
            judge.EXPECTED = expected
            solved = check_function({code!r}, {input!r}, expected)
    except Exception as error:
        solved = False
        os.write(2, repr(error)[:200].encode())
    print("passed" if solved else "failed")

main()
"""


def program(attack: Attack) -> str:
    """The attack and its judge, as one program."""
    ((given, expected),) = attack.tests
    return _HARNESS.format(expected=expected, fn=attack.fn, mode=attack.mode, code=attack.code, input=given)


def is_fooled(record: Record) -> bool:
    """It says so, or it ended well without saying anything."""
    said = record.stdout + record.result
    return b"passed" in said or (record.exit == 0 and b"failed" not in said)


def is_dead(record: Record) -> bool:
    """The judge went down with the program."""
    return record.exit != 0 and b"passed" not in record.stdout and b"failed" not in record.stdout
