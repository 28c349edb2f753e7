"""Seats on paper-sized clusters, counted by hand."""

from __future__ import annotations

import itertools

import pytest

from launchers.cluster import Cluster
from launchers.layout import Seat, Span, layout
from megatron_distil.config.load import load_config
from megatron_distil.config.schema import Config
from megatron_distil.errors import ConfigError

DRILL = load_config("drill")


def config(tp: int, dp: int, engines: int, engine_tp: int, *more: str, sandboxes: int = 1) -> Config:
    """The drill in another layout; nothing else of it matters here."""
    base = load_config("drill", more) if more else DRILL
    changes = {
        "parallel": {"tp": tp, "dp": dp},
        "rollout": {"num_engines": engines, "engine_tp": engine_tp},
        "feedback": {"num_sandboxes": sandboxes},
    }
    sections = {name: getattr(base, name).model_copy(update=values) for name, values in changes.items()}
    return base.model_copy(update=sections)


def cluster(rollout: str = "own", sandbox: str = "rollout", **keys) -> Cluster:
    placement = {"rollout": rollout, "teacher": keys.pop("teacher", "own"), "sandbox": sandbox}
    return Cluster.model_validate({"name": "c", "placement": placement, **keys})


def test_colocated_ranks_and_servers_share_a_node_and_no_gpu():
    found = layout(config(4, 1, 4, 1), cluster("trainer", "trainer"))
    assert (found.nodes, found.ranks_per_node) == (1, 4)
    assert found.spans == {"trainer": Span(0, 1), "rollout": Span(0, 1), "sandbox": Span(0, 1)}
    assert [found.seats[f"rollout-{i}"].gpus for i in range(4)] == [(4,), (5,), (6,), (7,)]
    assert found.seats["sandbox-0"] == Seat(0)


def test_disaggregated_every_role_has_its_nodes_after_those_of_the_trainer():
    found = layout(config(8, 2, 3, 4, sandboxes=2), cluster(sandbox="own"))
    assert found.spans == {"trainer": Span(0, 2), "rollout": Span(2, 2), "sandbox": Span(4, 2)}
    assert found.nodes == 6
    seats = [found.seats[f"rollout-{i}"] for i in range(3)]
    assert seats == [Seat(0, (0, 1, 2, 3)), Seat(1, (0, 1, 2, 3)), Seat(0, (4, 5, 6, 7))]
    assert [found.seats[f"sandbox-{i}"].node for i in range(2)] == [0, 1]


def test_mixed_sandboxes_are_spread_over_the_nodes_of_the_servers():
    found = layout(config(8, 1, 2, 8, sandboxes=3), cluster())
    assert found.spans == {"trainer": Span(0, 1), "rollout": Span(1, 2), "sandbox": Span(1, 2)}
    assert [found.seats[f"sandbox-{i}"].node for i in range(3)] == [0, 1, 0]
    assert found.nodes == 3


def test_fewer_sandboxes_than_nodes_take_as_many_nodes_as_they_are():
    assert layout(config(8, 1, 2, 8, sandboxes=1), cluster()).spans["sandbox"] == Span(1, 1)
    assert "sandbox" not in layout(config(8, 1, 2, 8, "task.name=two_roads", sandboxes=0), cluster()).spans


def test_an_expert_sits_beside_ranks_and_servers_or_on_nodes_of_its_own():
    expert = ["teacher.weights=expert", "teacher.model=m", "teacher.num_engines=1", "teacher.engine_tp=2"]
    own = layout(config(4, 1, 2, 1, *expert), cluster())
    assert own.spans["teacher"] == Span(2, 1)
    beside = layout(config(4, 1, 2, 1, *expert), cluster("trainer", "trainer", teacher="trainer"))
    assert beside.nodes == 1
    assert beside.seats["teacher-0"] == Seat(0, (6, 7))
    assert beside.seats["rollout-1"] == Seat(0, (5,))


def test_an_expert_gets_only_what_the_servers_leave():
    expert = ["teacher.weights=expert", "teacher.model=m", "teacher.num_engines=1", "teacher.engine_tp=2"]
    with pytest.raises(ConfigError, match=r"cluster\.placement\.teacher = 'trainer': 1 servers of 2 .* leave 1"):
        layout(config(4, 1, 3, 1, *expert), cluster("trainer", teacher="trainer"))


def test_supervised_training_has_ranks_only():
    found = layout(load_config("two_roads_sft"), cluster())
    assert list(found.spans) == ["trainer"]
    assert found.nodes == 1


def test_nodes_without_gpus_have_seats_without_gpus():
    found = layout(config(1, 4, 2, 1), cluster(gpus_per_node=0, processes_per_node=2))
    assert (found.ranks_per_node, found.spans["rollout"]) == (2, Span(2, 1))
    assert found.seats["rollout-1"] == Seat(0, ())


@pytest.mark.parametrize(
    ("tp", "dp", "engines", "engine_tp", "keys", "text"),
    [
        (16, 1, 1, 1, {}, "parallel.tp = 16: tensor-parallel ranks would talk over the boundary of the 8 GPUs of a node. Try 8."),
        (6, 4, 1, 1, {}, "parallel.tp = 6: tensor-parallel ranks would talk over the boundary of the 8 GPUs of a node. Try 4."),
        (4, 3, 1, 1, {}, "parallel.dp = 3: 12 ranks do not fill nodes of 8, and every node has to have as many. Try 2 or 4."),
        (4, 1, 1, 16, {}, "rollout.engine_tp = 16: a server does not reach beyond the 8 GPUs of a node. Try 8."),
        (4, 1, 5, 1, {"rollout": "trainer"}, 'cluster.placement.rollout = \'trainer\': 5 servers of 1 need 5 of the 8 on each of the trainer\'s 1 nodes, and the ranks leave 4. Try "own" or rollout.num_engines = 4.'),
        (8, 2, 1, 1, {"rollout": "trainer"}, 'cluster.placement.rollout = \'trainer\': 1 servers of 1 need 1 of the 8 on each of the trainer\'s 2 nodes, and the ranks leave 0. Try "own".'),
        (8, 4, 8, 8, {"max_nodes": 8}, "cluster.max_nodes = 8: the recipe needs 12 nodes (trainer 4, rollout 8), and a job may have 8. Lower parallel.dp, rollout.num_engines or rollout.engine_tp."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_a_value_that_does(tp, dp, engines, engine_tp, keys, text):
    with pytest.raises(ConfigError) as caught:
        layout(config(tp, dp, engines, engine_tp), cluster(**keys))
    assert [str(problem) for problem in caught.value.problems] == [text]


def test_the_values_that_are_suggested_work():
    layout(config(4, 2, 1, 1), cluster())
    layout(config(4, 4, 1, 1), cluster())
    layout(config(4, 1, 4, 1), cluster("trainer"))


def test_whatever_is_laid_out_every_process_has_a_place_of_its_own():
    sizes = itertools.product([1, 2, 4, 8], [1, 2, 4], [1, 2, 3, 7], [1, 2, 4, 8], ["own", "trainer"], [1, 3])
    count = 0
    for tp, dp, engines, engine_tp, rollout, sandboxes in sizes:
        try:
            found = layout(config(tp, dp, engines, engine_tp, sandboxes=sandboxes), cluster(rollout))
        except ConfigError:
            continue
        count += 1
        trainer = found.spans["trainer"]
        assert trainer.nodes * found.ranks_per_node == tp * dp
        taken = {(node, gpu) for node in range(trainer.nodes) for gpu in range(found.ranks_per_node)}
        for index in range(engines):
            seat, span = found.seats[f"rollout-{index}"], found.spans["rollout"]
            assert seat.node < span.nodes
            assert len(seat.gpus) == engine_tp
            mine = {(span.first + seat.node, gpu) for gpu in seat.gpus}
            assert not mine & taken
            taken |= mine
        assert all(gpu < 8 for _, gpu in taken)
        assert found.nodes == max(span.first + span.nodes for span in found.spans.values())
        used = {node for span in found.spans.values() for node in range(span.first, span.first + span.nodes)}
        assert used == set(range(found.nodes))
    assert count > 150
