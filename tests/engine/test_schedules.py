"""Which comparisons are trained on: subsets, whole lists, easy ones first; how the held-out ones are batched."""

from dataclasses import replace

import numpy as np
import pytest

from engine.tiny import World, config, edges, make_lists, policy_scorer
from jpo_ray.engine.batches import Limits, lists, pairs, phased
from jpo_ray.engine.dataset import EdgeList, EdgeShards, PreferenceData
from jpo_ray.engine.schedules import (
    EdgeSchedule,
    count_steps,
    difficulty,
    lists_of,
    training_edges,
    validation_batches,
    weighted_by_list,
)
from jpo_ray.engine.tasks import preference_task


@pytest.fixture(scope="module")
def four(world: World) -> PreferenceData:
    return make_lists(world.model).data


def test_subsets_of_one_seed_are_nested(world: World) -> None:
    two, three, other = (
        training_edges(world.data, config(max_train_comparisons=count), seed)[0]
        for count, seed in ((2, 5), (3, 5), (3, 6))
    )
    chosen = [list(zip(some.chosen.tolist(), some.rejected.tolist(), strict=True)) for some in (two, three, other)]
    assert chosen[1][:2] == chosen[0]
    assert (len(chosen[1]), set(chosen[1]) == set(chosen[2])) == (3, False)
    assert training_edges(world.data, config(), 5) is world.data.train


def test_subsets_of_lists_are_whole_lists(four: PreferenceData) -> None:
    """Lists of six, three and one comparisons; at least one list, however small the limit."""
    sizes = {
        limit: sorted(np.unique(lists_of(four, kept), return_counts=True)[1].tolist())
        for limit in (1, 4, 7, 9, 10)
        for kept in [training_edges(four, config(objective="lipo", max_train_comparisons=limit), seed=1)[0]]
    }
    assert sizes[10] == [1, 3, 6]
    assert all(set(found) <= {1, 3, 6} and found for found in sizes.values())
    assert all(sum(found) <= limit for limit, found in sizes.items() if len(found) > 1)
    assert sum(sizes[9]) >= sum(sizes[4])


def test_batches_of_lists_hold_whole_lists() -> None:
    """Thirty lists of one to six edges, at most eight to a batch: each edge once, no list parted, another order each
    epoch; as few batches as the order allows, so no two neighbours fit into one.
    """
    rng = np.random.default_rng(0)
    list_of = np.repeat(np.arange(30), rng.integers(1, 7, 30))[rng.permutation(30)[0] :]
    first = np.arange(len(list_of))
    epochs = [lists(list_of, first, first + 1000, Limits(8), seed=3, epoch=epoch) for epoch in (0, 1, 0)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == first.tolist()
        members = [set(list_of[batch].tolist()) for batch in batches]
        assert sum(len(some) for some in members) == len(np.unique(list_of))
        assert max(len(batch) for batch in batches) <= 8
        assert len(batches) < len(np.unique(list_of)) * 2 / 3
    orders = [np.concatenate(batches).tolist() for batches in epochs]
    assert orders[0] == orders[2] != orders[1]


def test_a_list_beyond_the_limits_is_a_batch_of_its_own() -> None:
    list_of = np.array([0, 0, 0, 0, 0, 1, 2])
    batches = lists(list_of, np.arange(7), np.arange(7) + 10, Limits(2), seed=0, epoch=0)
    assert sorted(sorted(batch.tolist()) for batch in batches) in (
        [[0, 1, 2, 3, 4], [5], [6]],
        [[0, 1, 2, 3, 4], [5, 6]],
    )
    lengths = np.full(17, 10)
    batches = lists(list_of, np.arange(7), np.arange(7) + 10, Limits(99, 30, lengths), seed=0, epoch=0)
    assert sorted(len(batch) for batch in batches) == [1, 1, 5]  # 100, 20 and 20 tokens


def test_no_edges_are_no_batches() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert lists(none, none, none, Limits(8), 0, 0) == []


def test_phases_go_from_easy_to_hard() -> None:
    """Eleven edges in three phases of 4, 4 and 3, in batches of two."""
    hardness = np.random.default_rng(0).random(11)
    batches = phased(hardness, 3, pairs, np.arange(11), np.arange(11) + 20, Limits(2), 7, 0)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 2, 1]
    easiest_first = np.argsort(hardness)
    for phase, share in ((batches[:2], easiest_first[:4]), (batches[2:4], easiest_first[4:8])):
        assert set(np.concatenate(phase).tolist()) == set(share.tolist())
    shuffled = np.concatenate(batches[:2]).tolist()
    assert (
        shuffled
        != np.concatenate(phased(hardness, 3, pairs, np.arange(11), np.arange(11), Limits(2), 7, 1)[:2]).tolist()
    )


def test_a_curriculum_of_the_config(world: World) -> None:
    """Gaps 0.5, 1.5, 2.5 in turn: of three phases the first has the widest. Two epochs each begin easy."""
    train = config(curriculum={"phases": 3}, comparisons_per_step=2, num_train_epochs=2)
    schedule = EdgeSchedule(world.data, world.data.train, train, seed=0)
    gaps = [schedule.batch(step).gap.tolist() for step in range(schedule.total_steps)]
    assert (
        gaps
        == [[2.5] * 2] * 2 + [[1.5] * 2] * 2 + [[0.5] * 2] * 2 + [[2.5] * 2] * 2 + [[1.5] * 2] * 2 + [[0.5] * 2] * 2
    )
    assert (schedule.steps_per_epoch, schedule.total_steps) == (6, 12)


def test_difficulty_by_the_reference(world: World) -> None:
    """Per token of the responses: how much likelier the rejected one is."""
    data = world.data
    assert data.reference is not None
    mean = data.reference[:12, 1] / data.tokens.response_tokens[:12]
    found = difficulty(data, data.train[0], "reference")
    assert found[0] == pytest.approx(mean[1] - mean[0])
    assert found[6] == pytest.approx(mean[3] - mean[0])  # joint: items 0 and 3
    assert difficulty(data, data.train[0], "gap").tolist() == (-data.train[0].gap).tolist()


def test_held_out_edges_come_as_in_training_where_that_matters(world: World, four: PreferenceData) -> None:
    """All at once for JPO; whole lists of four; batches of two for RPO."""
    data = replace(world.data, validation=edges([(0, 1), (2, 3), (4, 5)], [(0, 3), (2, 5)]))
    assert [part.tolist() for part in validation_batches(data, config(), seed=0)] == [[0, 1, 2, 3, 4]]
    rpo = validation_batches(data, config(objective="rpo", comparisons_per_step=2), seed=0)
    assert sorted(len(part) for part in rpo) == [1, 2, 2]
    lipo = validation_batches(four, config(objective="lipo", comparisons_per_step=2), seed=0)
    assert sorted(sorted(part.tolist()) for part in lipo) == [[0, 1], [2]]


def test_lists_of_unequal_size_count_alike(world: World, four: PreferenceData) -> None:
    """Lists of six, three and one comparisons, by hand, where the policy is the reference: all scores are 0.

    The items of a list then have the ranks 1 to 4 in its order, of 1 / log(1 + rank) = 1.4426950, 0.9102392, 0.7213475,
    0.6213349, and LiPO's loss of a pair is |G - G'| |1 / D - 1 / D'| log 2. Shares of wins 1, 2/3, 1/3, 0 (gains 1,
    0.5874011, 0.2599210, 0): 1.8324613 log 2 = 1.2701653. Shares 1/2, 1, 0, 0 (gains 0.4142136, 1, 0, 0): 1.4287118
    log 2 = 0.9903076. Shares 0, 1: 0.5324558 log 2 = 0.3690702. Their mean is 0.8765144; were comparisons averaged, it
    would be 1.0960985.
    """
    train = config(objective="lipo", lora_dropout=0.0)
    scorer = policy_scorer(world.model, train, moved=False)
    metrics = preference_task(scorer, four, train, seed=0).gradients(0)
    assert (metrics["joint/edges"], metrics["loss"]) == (10, pytest.approx(0.8765144, abs=2e-6))
    held_out = replace(four, validation=four.train[0])
    found = preference_task(scorer, held_out, train.model_copy(update={"comparisons_per_step": 1}), seed=0).evaluate()
    assert found["eval_loss"] == pytest.approx(0.8765144, abs=2e-6)


def test_weights_are_shares_of_a_lists_alone(world: World, four: PreferenceData) -> None:
    """Own weights 1, 2, 1, 2, ...: of the list of six 9, of the one of three 1 + 2 + 1, of the last 2."""
    found = weighted_by_list(four, four.train[0], config(objective="pro")).weight
    shares = [1 / 9, 2 / 9, 1 / 9, 2 / 9, 1 / 9, 2 / 9, 1 / 4, 2 / 4, 1 / 4, 1]
    assert found.tolist() == pytest.approx(shares)
    assert weighted_by_list(world.data, world.data.train[0], config()) is world.data.train[0]


@pytest.mark.parametrize("objective", ["lipo", "rpo", "kto"])
def test_held_out_loss_is_that_of_its_batches(objective: str, world: World, four: PreferenceData) -> None:
    """The validation edges trained on as one epoch, the weights standing still, have the same mean loss."""
    data = four if objective == "lipo" else world.data
    train = config(objective=objective, lora_dropout=0.0, comparisons_per_step=2 if objective != "kto" else 64)
    scorer = policy_scorer(world.model, train)
    held_out = preference_task(scorer, data, train, seed=0).evaluate()
    same = preference_task(scorer, replace(data, train=EdgeShards.of(data.validation)), train, seed=0)
    batches = validation_batches(data, train, seed=0)
    counted = weighted_by_list(data, data.validation, train)
    weights = [float(counted.weight[batch].sum()) for batch in batches]
    losses = [same.gradients(step)["loss"] for step in range(len(batches))]
    assert held_out["eval_loss"] == pytest.approx(np.average(losses, weights=weights), rel=1e-6)


def parted(data: PreferenceData, *ends: int) -> PreferenceData:
    """The same edges in shards."""
    parts = np.split(np.arange(data.train.count), ends)
    whole = data.train[0]
    return replace(data, train=EdgeShards([len(part) for part in parts], lambda number: whole.take(parts[number])))


@pytest.mark.parametrize("batching", ["pairs", "graph"])
def test_an_epoch_goes_shard_by_shard(world: World, batching: str) -> None:
    """Twelve edges in shards of 5, 3 and 4, two to a step: 3 + 2 + 2 steps, each edge once, in an order of shards that
    differs between epochs; any step can be asked for alone, as a resumed run does.
    """
    data = parted(world.data, 5, 8)
    whole = world.data.train[0]
    train = config(comparisons_per_step=2, num_train_epochs=4, batching=batching)
    schedule = EdgeSchedule(data, data.train, train, seed=0)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (7, 28)
    numbers = [schedule.numbers(step) for step in range(28)]
    orders = []
    for epoch in range(4):
        steps = range(7 * epoch, 7 * epoch + 7)
        found = [pair for step in steps for pair in zip(*_ends(schedule.batch(step)), strict=True)]
        assert sorted(found) == sorted(zip(*_ends(whole), strict=True))
        orders.append(list(dict.fromkeys(numbers[step][0] for step in steps)))
        assert sorted(orders[-1]) == [0, 1, 2]
    assert len({tuple(order) for order in orders}) > 1
    fresh = EdgeSchedule(data, data.train, train, seed=0)
    for step in (20, 3, 27):
        assert fresh.numbers(step)[0] == numbers[step][0]
        assert fresh.numbers(step)[1].tolist() == numbers[step][1].tolist()


def test_subsets_take_of_every_shard_its_share(world: World) -> None:
    """Of shards of 6, 3 and 3 edges: nested, and never more than one away from the share."""
    data = parted(world.data, 6, 9)
    before: set[tuple[int, int]] = set()
    for limit in range(1, 12):
        kept = training_edges(data, config(max_train_comparisons=limit), seed=5)
        assert kept.count == limit
        found = {pair for n in range(len(kept.sizes)) for pair in zip(*_ends(kept[n]), strict=True)}
        assert len(found) == limit
        assert before < found
        before = found
    assert training_edges(data, config(max_train_comparisons=8), seed=5).sizes == [4, 2, 2]


@pytest.mark.parametrize(("limit", "epochs"), [(None, 4), (None, 0.5), (8, 1), (12, 2)])
def test_steps_are_counted_without_the_edges(world: World, limit: int | None, epochs: float) -> None:
    data = parted(world.data, 6, 9)
    train = config(comparisons_per_step=4, num_train_epochs=epochs, max_train_comparisons=limit)
    schedule = EdgeSchedule(data, training_edges(data, train, seed=5), train, seed=0)
    assert count_steps(data.train.sizes, train) == schedule.total_steps


def test_steps_of_shards_whose_batches_must_be_made_to_be_counted(world: World) -> None:
    """At most 60 tokens to a batch: as many steps as the shards' batches, each edge once."""
    data = parted(world.data, 7)
    train = config(comparisons_per_step=8, num_train_epochs=2, max_batch_tokens=60)
    schedule = EdgeSchedule(data, data.train, train, seed=1)
    found = [pair for step in range(schedule.total_steps) for pair in zip(*_ends(schedule.batch(step)), strict=True)]
    assert sorted(found) == sorted([*zip(*_ends(world.data.train[0]), strict=True)] * 2)


def _ends(edges: EdgeList) -> tuple[list[int], list[int]]:
    return edges.chosen.tolist(), edges.rejected.tolist()
