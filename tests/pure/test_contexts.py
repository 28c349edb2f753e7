import pytest

from megatron_distil.config.schema import TeacherConfig
from megatron_distil.tasks import program_induction, two_roads
from megatron_distil.teacher.context import ContextBuilder
from megatron_distil.types import Outcome, RolloutId
from tests.task_records import Counts, characters, prompt_from, rollout, said

INDUCTION, ROADS = program_induction.TASK, two_roads.TASK
PROMPT = prompt_from(INDUCTION, INDUCTION.example)
OTHER = prompt_from(INDUCTION, {**INDUCTION.example, "id": "other", "prompt": "0:1,1:2,10:11"})
WRONG = "x*18+2:2,20,182"


class Group:
    """Four attempts at one prompt: two fail, two succeed."""

    def __init__(self):
        texts = ["x*18+2", "x*81+2", "x+1", "81*x+2"]
        self.rollouts = [rollout(text, sample=index) for index, text in enumerate(texts)]
        self.feedback = [
            said(self.rollouts[0], Outcome.FAILED, WRONG),
            said(self.rollouts[1], Outcome.PASSED),
            said(self.rollouts[2], Outcome.FAILED, "x+1:1,2,11"),
            said(self.rollouts[3], Outcome.PASSED),
        ]

    def replace(self, index, text, outcome, feedback=""):
        self.rollouts[index] = rollout(text, sample=index)
        self.feedback[index] = said(self.rollouts[index], outcome, feedback)


def build(group, task=INDUCTION, prompts=(PROMPT,), counts=None, **settings):
    config = TeacherConfig(**settings)
    builder = ContextBuilder(
        task=task,
        encode=characters,
        defuse=lambda text: text.replace("<eos>", "< eos>"),
        config=config,
        add=counts or Counts(),
    )
    return builder.build(prompts, group.rollouts, group.feedback)


def texts(contexts):
    return [context.text if context else None for context in contexts]


def test_a_sibling_replaces_the_feedback():
    assert texts(build(Group(), feedback="without_solution")) == [
        "0:2,1:83,10:812#x*81+2>",
        "0:2,1:83,10:812#81*x+2>",
        "0:2,1:83,10:812#x*81+2>",
        "0:2,1:83,10:812#x*81+2>",
    ]


def test_feedback_is_read_when_nobody_succeeded():
    group = Group()
    group.replace(1, "x", Outcome.FAILED, "x:0,1,10")
    group.replace(3, "7", Outcome.FAILED, "7:7,7,7")
    assert texts(build(group, feedback="without_solution")) == [
        "0:2,1:83,10:812?x*18+2:2,20,182>",
        "0:2,1:83,10:812?x:0,1,10>",
        "0:2,1:83,10:812?x+1:1,2,11>",
        "0:2,1:83,10:812?7:7,7,7>",
    ]


def test_always_shows_both_and_never_shows_none():
    both = build(Group(), feedback="always")
    assert texts(both)[:2] == ["0:2,1:83,10:812?x*18+2:2,20,182#x*81+2>", "0:2,1:83,10:812#81*x+2>"]
    assert [context.shows_feedback for context in both] == [True, False, True, False]
    assert texts(build(Group(), feedback="never"))[0] == "0:2,1:83,10:812#x*81+2>"


def test_a_lone_success_is_not_its_own_sibling():
    group = Group()
    group.replace(3, "7", Outcome.FAILED, "7:7,7,7")
    contexts = build(group)
    assert contexts[1] is None
    assert [context.demonstration for context in contexts if context] == [RolloutId(3, "train-00000", 1)] * 3


def test_a_sibling_is_of_the_same_prompt():
    group = Group()
    group.rollouts[1] = rollout("x*81+2", prompt="other", sample=1)
    group.rollouts[3] = rollout("81*x+2", prompt="other", sample=3)
    group.feedback[1] = said(group.rollouts[1], Outcome.PASSED)
    group.feedback[3] = said(group.rollouts[3], Outcome.PASSED)
    shown = [context.demonstration for context in build(group, prompts=(PROMPT, OTHER)) if context]
    assert shown == [None, RolloutId(3, "other", 3), None, RolloutId(3, "other", 1)]


def test_without_a_verdict_there_is_no_context_and_no_demonstration():
    group = Group()
    group.replace(1, "x*81+2", Outcome.UNAVAILABLE)
    group.replace(0, "x*18+2", Outcome.UNAVAILABLE)
    contexts = build(group, feedback="always")
    assert texts(contexts) == [None, None, "0:2,1:83,10:812?x+1:1,2,11#81*x+2>", None]


def test_a_random_sibling_is_a_function_of_the_rollout_and_every_success_is_drawn():
    group = Group()
    for index, text in enumerate(["x*81+2", "2+x*81", "2+81*x", "81*x+2"]):
        group.replace(index, text, Outcome.PASSED)
    drawn = set()
    for step in range(40):
        group.rollouts = [
            r.__class__(**{**fields(r), "rollout_id": r.rollout_id._replace(step=step)}) for r in group.rollouts
        ]
        group.feedback = [said(r, Outcome.PASSED) for r in group.rollouts]
        first, again = build(group, sibling="random"), build(group, sibling="random")
        assert texts(first) == texts(again)
        assert all(c.demonstration != r.rollout_id for c, r in zip(first, group.rollouts, strict=True))
        drawn |= {(r.rollout_id.sample, c.demonstration.sample) for r, c in zip(group.rollouts, first, strict=True)}
    assert drawn == {(own, other) for own in range(4) for other in range(4) if own != other}


def fields(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_a_reference_is_shown_to_everyone_and_is_nobodys_response():
    group = Group()
    contexts = build(group, demonstration="reference", feedback="always")
    assert texts(contexts) == [
        "0:2,1:83,10:812?x*18+2:2,20,182#x*81+2>",
        "0:2,1:83,10:812#x*81+2>",
        "0:2,1:83,10:812?x+1:1,2,11#x*81+2>",
        "0:2,1:83,10:812#x*81+2>",
    ]
    assert [context.demonstration for context in contexts] == [None] * 4
    assert texts(build(group, demonstration="reference", feedback="never")) == ["0:2,1:83,10:812#x*81+2>"] * 4


def test_a_row_without_a_reference_has_none_and_a_task_without_any_neither():
    bare = prompt_from(INDUCTION, {key: value for key, value in INDUCTION.example.items() if key != "solution"})
    assert texts(build(Group(), prompts=(bare,), demonstration="reference", feedback="never")) == [None] * 4
    prompt = prompt_from(ROADS, ROADS.example)
    assert texts(build(Group(), task=ROADS, prompts=(prompt,), demonstration="reference"))[0] == (
        "4721?x*18+2:2,20,182>"
    )


def test_a_teacher_that_knows_more_by_itself_reads_what_the_student_reads():
    group = Group()
    group.replace(2, "x", Outcome.UNAVAILABLE)
    contexts = build(group, context="prompt", demonstration="reference", max_context_tokens=1)
    assert texts(contexts) == ["0:2,1:83,10:812>", "0:2,1:83,10:812>", None, "0:2,1:83,10:812>"]
    assert all(c.token_ids.tolist() == PROMPT.token_ids.tolist() and not c.shows_feedback for c in contexts if c)


def test_thoughts_of_a_sibling_are_not_shown():
    group = Group()
    group.replace(1, "<think>0:2,\nso</think>\n\nx*81+2", Outcome.PASSED)
    assert texts(build(group))[0] == "0:2,1:83,10:812#x*81+2>"


def test_the_key_is_read_after_a_right_response_too_and_siblings_are_not():
    prompt = prompt_from(ROADS, ROADS.example)
    group = Group()
    group.rollouts = [rollout("x4721", sample=0), rollout("(999", sample=1), rollout("(538", sample=2)]
    outcomes = (Outcome.PASSED, Outcome.FAILED, Outcome.PASSED)
    group.feedback = [said(r, o, "538") for r, o in zip(group.rollouts, outcomes, strict=True)]
    for setting in ("always", "without_solution"):
        contexts = build(group, task=ROADS, prompts=(prompt,), feedback=setting)
        assert texts(contexts) == ["4721?538>"] * 3
        assert [context.demonstration for context in contexts] == [None] * 3


# "0:2,1:83,10:812" is 15 tokens, "?x*18+2:2,20,182" is 16, "#x*81+2" is 7, ">" is 1.
@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (39, "0:2,1:83,10:812?x*18+2:2,20,182#x*81+2>"),
        (38, "0:2,1:83,10:812?x*18+2:2,20,182#x*81+>"),
        (34, "0:2,1:83,10:812?x*18+2:2,20,182#x>"),
        (33, "0:2,1:83,10:812?x*18+2:2,20,182>"),
        (32, "0:2,1:83,10:812?x*18+2:2,20,182>"),
        (31, "0:2,1:83,10:812?x*18+2:2,20,18>"),
        (18, "0:2,1:83,10:812?x>"),
        (17, None),
        (1, None),
    ],
)
def test_the_demonstration_is_cut_first_then_the_feedback_and_never_the_template(max_tokens, expected):
    counts = Counts()
    context = build(Group(), counts=counts, feedback="always", max_context_tokens=max_tokens)[0]
    assert texts([context]) == [expected]
    if context is not None:
        assert len(context.token_ids) <= max_tokens
        assert context.token_ids.tolist() == characters(context.text).tolist()
        assert (context.demonstration is None) == ("#" not in context.text)
        assert context.shows_feedback == ("?" in context.text)


def test_contexts_that_are_cut_or_do_not_fit_are_counted():
    counts = Counts()
    # Whole: 39, 23, 35 and 23 tokens.
    build(Group(), counts=counts, feedback="always", max_context_tokens=23)
    assert counts.sums == {"teacher/shortened_frac": (2, 4), "teacher/too_long_frac": (0, 4)}
    build(Group(), counts=counts, feedback="always", max_context_tokens=17)
    assert counts.sums == {"teacher/shortened_frac": (0, 0), "teacher/too_long_frac": (4, 4)}


def test_what_others_wrote_spells_no_special_token():
    group = Group()
    group.replace(0, "x", Outcome.FAILED, "x<eos>:1")
    group.replace(1, "x*81+2<eos>", Outcome.PASSED)
    assert texts(build(group, feedback="always"))[0] == "0:2,1:83,10:812?x< eos>:1#x*81+2< eos>>"


def test_feedback_that_is_cut_leaves_no_fence_open():
    group = Group()
    whole = "Test 1\nInput:\n```\n12\n```\nOutput:\n```\n3\n```"
    group.replace(0, "x", Outcome.FAILED, whole)
    for index in (1, 3):
        group.replace(index, "x", Outcome.FAILED)
    seen = set()
    for room in range(15 + 1 + 1 + 1, 15 + 1 + 1 + len(whole) + 1):
        context = build(group, feedback="always", max_context_tokens=room)[0]
        assert len(context.token_ids) <= room
        shown = context.text.removeprefix("0:2,1:83,10:812?").removesuffix(">")
        assert shown.split("\n").count("```") % 2 == 0
        assert whole.startswith(shown)
        seen.add(shown)
    assert {"Test 1\nInput:", "Test 1\nInput:\n```\n12\n```", whole} <= seen
