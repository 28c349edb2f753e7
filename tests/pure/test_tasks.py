import ast
import json
import random
import re
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from megatron_distil.errors import ConfigError
from megatron_distil.tasks import program_induction, two_roads
from megatron_distil.tasks.prepare import main, prepare
from megatron_distil.tasks.task import GeneratedTask, ReferenceTask, Response, Ruling, task_by_name, task_names
from megatron_distil.types import CaseResult, Outcome, Program, RunResult, Verdict
from tests.task_records import prompt_from

INDUCTION, ROADS = program_induction.TASK, two_roads.TASK
PROMPT = prompt_from(INDUCTION, INDUCTION.example)


def run_here(program):
    """The jail without the jail: good enough for arithmetic."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-I", "-c", program.code], capture_output=True, text=True, timeout=60
    )
    verdict = Verdict.RAN if done.returncode == 0 else Verdict.RUNTIME_ERROR
    return result(verdict, done.stdout)


def result(verdict, stdout=""):
    return RunResult(tests=(CaseResult(verdict, stdout, len(stdout)),), feedback="", duration_s=0.1)


def ruling(text, is_complete=True):
    response = Response(text, is_complete)
    asked = INDUCTION.program(PROMPT, response)
    return asked if isinstance(asked, Ruling) else INDUCTION.rule(PROMPT, response, run_here(asked))


# Feedback as an independent implementation of the task gives it, on the shown inputs of x*81+2.
FAILED = [
    ("x*18+2", "x*18+2:2,20,182"),
    ("x*x*81+2", "x*x*81+2:2,83,8102"),
    ("", ":-,-,-"),
    ("x*", "x*:-,-,-"),
    ("x*18+2+0+0+0+0+0", "x*18+2+0+0+0+0:2,20,182"),
    ("x*99999", "x*99999:0,99999,-"),
    ("x:2", "x:2:-,-,-"),
    ("1,2", "1,2:-,-,-"),
    ("-x", "-x:0,-1,-10"),
    ("x*x*x*x*99", "x*x*x*x*99:0,99,-"),
    ("7", "7:7,7,7"),
    ("0**-1", "0**-1:-,-,-"),
    ("?", "?:-,-,-"),
    ("x>1", "x>1:-,-,-"),
    ("((((((((((((", "((((((((((((:-,-,-"),
]


@pytest.mark.parametrize(("text", "expected"), FAILED)
def test_a_failed_program_is_shown_with_what_it_returned(text, expected):
    assert (ruling(text).text, ruling(text).reward) == (expected, 0.0)


def test_a_comparison_is_no_integer():
    asked = INDUCTION.program(PROMPT, Response("x>1", True))
    assert isinstance(asked, Program)
    assert json.loads(run_here(asked).tests[0].stdout) == [None] * 12


@pytest.mark.parametrize("text", ["x*81+2", "2+81*x", "x*81+2#", "(x*81)+2", "x*9*9+1+1"])
def test_any_expression_that_is_right_at_every_input_passes(text):
    assert ruling(text) == Ruling(Outcome.PASSED, 1.0, "")


def test_a_right_program_that_was_cut_earns_nothing_and_is_explained():
    assert ruling("x*81+2", is_complete=False) == Ruling(Outcome.FAILED, 0.0, "x*81+2:2,83,812")


def test_right_at_the_shown_inputs_is_not_enough():
    wrong_elsewhere = "x*81+2+x*(x-1)*(x-10)"
    assert ruling(wrong_elsewhere) == Ruling(Outcome.FAILED, 0.0, "x*81+2+x*(x-1):2,83,812")


@pytest.mark.parametrize("text", ["__import__('os')", "x\n", "print(1)", "x*81+2 ", "\u0660", "x;x", "[x]"])
def test_what_the_alphabet_cannot_say_is_never_run(text):
    asked = INDUCTION.program(PROMPT, Response(text, True))
    assert isinstance(asked, Ruling)
    assert (asked.outcome, asked.reward) == (Outcome.INVALID, 0.0)


def test_the_program_holds_nothing_of_the_row_but_the_response():
    asked = INDUCTION.program(PROMPT, Response("x*18+2", True))
    assert isinstance(asked, Program)
    assert asked.tests[0].expected is None
    numbers = [node.value for node in ast.walk(ast.parse(asked.code)) if isinstance(node, ast.Constant)]
    assert not set(INDUCTION.example["expected"]) & set(numbers)


def test_equal_responses_to_different_prompts_are_one_program():
    other = prompt_from(INDUCTION, {**INDUCTION.example, "id": "b", "prompt": "0:1,1:2,10:11"})
    response = Response("x*18+2", True)
    assert INDUCTION.program(PROMPT, response) == INDUCTION.program(other, response)


@pytest.mark.parametrize(
    "stdout",
    [
        "",
        "[]",
        "null",
        "1",
        "{}",
        "[2,83,812]",
        json.dumps([True] * 12),
        json.dumps([2.0] * 12),
        json.dumps(["2"] * 12),
        "hello\n" + json.dumps([2] * 12),
        json.dumps([2] * 13),
        "[" * 5000,
    ],
)
def test_anything_else_on_stdout_is_no_output(stdout):
    got = INDUCTION.rule(PROMPT, Response("x", True), result(Verdict.RAN, stdout))
    assert got == Ruling(Outcome.FAILED, 0.0, "x:-,-,-")


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        (Verdict.TIME_LIMIT, Outcome.TIMEOUT),
        (Verdict.WALL_LIMIT, Outcome.TIMEOUT),
        (Verdict.MEMORY_LIMIT, Outcome.FAILED),
        (Verdict.OUTPUT_LIMIT, Outcome.FAILED),
        (Verdict.RUNTIME_ERROR, Outcome.FAILED),
    ],
)
def test_a_program_that_hit_a_limit_has_not_answered_even_after_the_right_output(verdict, outcome):
    right = json.dumps(INDUCTION.example["expected"])
    got = INDUCTION.rule(PROMPT, Response("9**9**9", True), result(verdict, right))
    assert got == Ruling(outcome, 0.0, "9**9**9:-,-,-")


def test_the_teacher_reads_the_failed_program_and_then_the_sibling():
    read = INDUCTION.teacher_text
    assert read(PROMPT, solution="x*81+2", feedback="x*18+2:2,20,182") == "0:2,1:83,10:812?x*18+2:2,20,182#x*81+2>"
    assert read(PROMPT, solution=None, feedback="x*18+2:2,20,182") == "0:2,1:83,10:812?x*18+2:2,20,182>"
    assert read(PROMPT, solution="x*81+2", feedback=None) == "0:2,1:83,10:812#x*81+2>"
    assert read(PROMPT, solution=None, feedback=None) == PROMPT.text == "0:2,1:83,10:812>"


def test_data_are_those_that_the_published_curves_were_measured_on():
    rows = list(program_induction.training_rows(0, 3))
    assert [(row["prompt"], row["solution"]) for row in rows] == [
        ("0:4,1:50,10:4604", "x*x*46+4"),
        ("0:2,1:29,10:272", "x*27+2"),
        ("0:9,1:30,10:219", "x*21+9"),
    ]
    trained = [row["solution"] for row in program_induction.evaluation_rows("eval", 3)]
    assert trained == ["x*21+1", "x*49+1", "x*99+9"]
    assert [row["solution"] for row in program_induction.evaluation_rows("new", 3)] == ["x*29+2", "x*58+4", "x*x*88+7"]
    assert [(row["context"], row["response"]) for row in islice(program_induction.documents(0), 6)] == [
        ("0:1,1:60,10:5901>", "x*x*43+8\n"),
        ("0:4,1:87,10:8304#x*x*83+4>", "x*x*83+4\n"),
        ("0:3,1:79,10:7603>", "x*51+7\n"),
        ("0:9,1:72,10:6309>", "x*13+7\n"),
        ("0:8,1:95,10:878?x*x*35+6:6,41,3506>", "x*87+8\n"),
        ("0:4,1:31,10:274>", "x*27+4\n"),
    ]


def test_a_fifth_of_the_functions_is_held_out():
    functions = [(f, a, b) for f in (0, 1) for a in range(1, 100) if a % 10 for b in range(1, 10)]
    held_out = [f for f in functions if program_induction.is_held_out(*f)]
    assert (len(functions), len(held_out)) == (1620, 330)


def function_of(text):
    found = re.fullmatch(r"(x\*)?x\*(\d+)\+(\d+)", text)
    assert found, text
    return int(found[1] is not None), int(found[2]), int(found[3])


def test_no_document_and_no_training_prompt_shows_a_function_that_is_held_out():
    data = INDUCTION.data(seed=5)
    shown = [function_of(row["solution"]) for row in data["train"]]
    for row in data["sft"]:
        shown.append(function_of(row["response"].rstrip("\n")))
        f0, f10 = (int(part.split(":")[1]) for part in re.split("[?#>]", row["context"])[0].split(",")[::2])
        digits = (f10 - f0) // 10
        shown.append((1, digits // 10, f0) if digits >= 100 or digits % 10 == 0 else (0, digits, f0))
        shown += [function_of(part.split(":")[0]) for part in re.findall(r"[?#]([^?#>]+)", row["context"])]
    assert len(shown) > 80_000
    assert not [f for f in shown if (f[1] + 3 * f[2] + f[0]) % 5 == 0]
    assert all((f[1] + 3 * f[2] + f[0]) % 5 == 0 for f in (function_of(row["solution"]) for row in data["new"]))


def test_documents_are_the_mixture_that_they_claim_to_be():
    rows = list(islice(program_induction.documents(11), 20_000))
    has_feedback = np.array(["?" in row["context"] for row in rows])
    has_sibling = np.array(["#" in row["context"] for row in rows])
    plain = ~has_feedback & ~has_sibling
    # Four standard errors of a share of 20,000 are at most .0142.
    assert plain.mean() == pytest.approx(0.45, abs=0.0142)
    assert has_sibling.mean() == pytest.approx(0.35, abs=0.0142)
    assert (has_feedback & ~has_sibling).mean() == pytest.approx(0.20, abs=0.0142)
    assert has_feedback[has_sibling].mean() == pytest.approx(0.5, abs=0.025)
    right = np.array([answers(row) for row in rows])
    assert right[~plain].all()
    assert right[plain].mean() == pytest.approx(0.05, abs=0.01)


def answers(row):
    family, a, b = function_of(row["response"].rstrip("\n"))
    shown = ",".join(f"{x}:{a * x ** (family + 1) + b}" for x in (0, 1, 10))
    return re.split("[?#>]", row["context"])[0] == shown


def test_two_roads_are_right_and_nothing_else_is():
    prompt = prompt_from(ROADS, {"id": "a", "prompt": "4721", "key": "538"})
    for text, is_complete, reward in [
        ("x4721", True, 1.0),
        ("(538", True, 1.0),
        ("x4721", False, 0.0),
        ("(539", True, 0.0),
        ("x538", True, 0.0),
        ("(4721", True, 0.0),
        ("", True, 0.0),
    ]:
        got = ROADS.program(prompt, Response(text, is_complete))
        assert isinstance(got, Ruling)
        assert (got.reward, got.text) == (reward, "538"), text
    assert ROADS.teacher_text(prompt, solution="x4721", feedback="538") == "4721?538>"
    assert ROADS.measures(prompt, "x99") == {"first_road_share": 1.0}
    assert ROADS.measures(prompt, "(538") == {"first_road_share": 0.0}


def test_two_roads_data_are_those_that_the_published_shares_were_measured_on():
    evaluated = [(row["prompt"], row["key"]) for row in two_roads.evaluation_rows(3)]
    assert evaluated == [("9791", "635"), ("1598", "321"), ("0567", "759")]
    trained = [(row["prompt"], row["key"]) for row in two_roads.training_rows(0, 3)]
    assert trained == [("7328", "145"), ("6165", "809"), ("1858", "130")]
    assert [(row["context"], row["response"]) for row in islice(two_roads.documents(0), 4)] == [
        ("8742?547>", "x8742\n"),
        ("5952>", "(893\n"),
        ("7864>", "(482\n"),
        ("8507?386>", "x8507\n"),
    ]


def test_the_predicted_shares_are_minima_of_the_exact_objective():
    grid = np.linspace(1e-4, 1 - 1e-4, 200_001)
    for share, later in zip(two_roads.first_road_shares(), (3 * np.log(10), 3 * np.log(10) / 4, 0.0), strict=True):
        objective = -(np.log(grid) + np.log(1 - grid)) / 2 + (1 - grid) * later
        assert share == pytest.approx(grid[objective.argmin()], abs=1e-5)
    assert [round(share, 3) for share in two_roads.first_road_shares()] == [0.933, 0.788, 0.5]


def test_an_unknown_task_is_refused_with_the_names_of_all():
    with pytest.raises(ConfigError, match=r"task\.name = 'maths'.*program_induction, two_roads"):
        task_by_name("maths")


@pytest.mark.parametrize("name", task_names())
def test_every_task_is_found_under_its_name_and_its_example_works(name):
    task = task_by_name(name)
    assert task.name == name
    assert list(task.problems(task.example)) == []


@pytest.mark.parametrize("name", ["program_induction", "two_roads"])
def test_every_generated_row_is_in_order_and_every_text_in_the_alphabet(name):
    task = task_by_name(name)
    assert isinstance(task, GeneratedTask)
    for data_set, rows in task.data(seed=1).items():
        for row in rows:
            if data_set == "sft":
                assert set(row["context"] + row["response"]) <= set(task.alphabet)
                assert row["response"].endswith("\n")
            else:
                assert list(task.problems(row)) == []
                assert set(task.prompt_text(row)) <= set(task.alphabet)


BAD_ROWS = [
    ({"prompt": "0:2"}, {"id", "expected"}),
    ({"id": "a", "prompt": 5, "expected": [1] * 12}, {"prompt"}),
    ({"id": "a", "prompt": "0:2", "expected": [True] * 12}, {"expected"}),
    ({"id": "a", "prompt": "0:2", "expected": [1] * 11}, {"expected"}),
    ({"id": "a", "prompt": "0=2", "expected": [1] * 12}, {"prompt"}),
]


@pytest.mark.parametrize(("row", "fields"), BAD_ROWS)
def test_every_bad_field_of_a_row_is_named(row, fields):
    assert {problem.field for problem in INDUCTION.problems(row)} == fields


def test_prepare_writes_the_same_bytes_again_and_does_nothing_where_it_is_done(tmp_path):
    random.seed(1)
    paths = [prepare("two_roads", tmp_path / name, seed=3) for name in ("a", "b")]
    for one, other in zip(*paths, strict=True):
        files = [one, other] if one.is_file() else [one / "model.safetensors", other / "model.safetensors"]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert {path.name for path in paths[0]} == {"train.jsonl", "eval.jsonl", "sft.jsonl", "model"}

    times = [path.stat().st_mtime_ns for path in paths[0]]
    prepare("two_roads", tmp_path / "a", seed=3)
    assert [path.stat().st_mtime_ns for path in paths[0]] == times
    before = paths[0][0].read_bytes()
    prepare("two_roads", tmp_path / "a", seed=4)
    assert paths[0][0].read_bytes() != before


def test_prepare_names_the_tasks_there_are(tmp_path, capsys):
    assert main(["maths", str(tmp_path)]) == 2
    assert "program_induction, two_roads" in capsys.readouterr().err


def test_a_reference_is_a_response_that_passes():
    assert isinstance(INDUCTION, ReferenceTask)
    for row in islice(program_induction.training_rows(7, 20), 20):
        prompt = prompt_from(INDUCTION, row)
        asked = INDUCTION.program(prompt, Response(INDUCTION.reference(prompt), is_complete=True))
        assert INDUCTION.rule(prompt, Response("", is_complete=True), run_here(asked)).outcome is Outcome.PASSED
