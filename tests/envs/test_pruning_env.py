from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
from pettingzoo.test import api_test, parallel_api_test
from pettingzoo.utils import parallel_to_aec

from envs.budget import Budget, keep_ratio, random_proportions
from envs.observations import LOCAL_FIELDS
from envs.pruning_env import PruningEnv, peer_of
from envs.records import Episode, Evaluation
from envs.rewards import Weights
from envs.toy import toy_env
from gan.errors import UserError
from gan.evaluations import FAMILIES, CountedScorer
from gan.plans import Plan
from tests.envs.conftest import FakeScorer, MakeEnv, run_episode

CYCLE = ("generator_A", "generator_B", "discriminator_A", "discriminator_B")
CASTS = [("generator", "discriminator"), ("generator",), ("discriminator",), CYCLE]


class Notes:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.plans: list[Evaluation] = []
        self.episodes: list[Episode] = []

    def on_plan(self, evaluation: Evaluation) -> None:
        self.plans.append(evaluation)

    def on_episode(self, episode: Episode) -> None:
        self.episodes.append(episode)


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, arrays included."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        np.testing.assert_array_equal(one, other)


# --- the contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("agents", CASTS, ids=len)
@pytest.mark.parametrize("reward", ["step", "final"])
def test_pettingzoo_parallel_api(make: MakeEnv, agents: tuple[str, ...], reward: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        parallel_api_test(make(agents, reward=reward), num_cycles=30)


def test_pettingzoo_aec_api(make: MakeEnv) -> None:
    with warnings.catch_warnings():
        # our vectors are bounded and mixed, which the test takes for unscaled images or missing one-hots
        warnings.simplefilter("ignore", UserWarning)
        api_test(parallel_to_aec(make()), num_cycles=30)


@pytest.mark.parametrize("agents", CASTS, ids=len)
@pytest.mark.parametrize("reward", ["step", "final"])
@pytest.mark.parametrize("actions", ["random", 1.0, -1.0, 1e9])
def test_every_observation_is_in_its_space(
    make: MakeEnv, agents: tuple[str, ...], reward: str, actions: str | float
) -> None:
    env = make(agents, dict.fromkeys(agents, "0.15:0.9"), reward=reward)
    for seed in range(3):
        chosen = np.random.default_rng(seed) if actions == "random" else float(actions)
        for observations, *_, state in run_episode(env, chosen, seed):  # type: ignore[arg-type]
            assert env.state_space.contains(state)
            for agent in agents:
                assert env.observation_space(agent).contains(observations[agent])


def test_episodes_are_deterministic_and_seeds_differ(make: MakeEnv) -> None:
    budgets = {"generator": "0.1:0.6", "discriminator": "0.2:0.8"}
    one, other = make(budgets=budgets), make(budgets=budgets)
    for seed in (3, None, None):  # None goes on from the last seed
        record = run_episode(one, np.random.default_rng(7), seed)
        assert_same(record, run_episode(other, np.random.default_rng(7), seed))
    first, second = (run_episode(one, np.random.default_rng(7), seed) for seed in (3, 4))
    assert not np.array_equal(first[0][0]["generator"], second[0][0]["generator"])
    assert first[-1][1] != second[-1][1]


@pytest.mark.parametrize("reward", ["step", "final"])
@pytest.mark.parametrize("agents", CASTS, ids=len)
def test_zero_actions_return_exactly_zero(make: MakeEnv, reward: str, agents: tuple[str, ...]) -> None:
    env = make(agents, dict.fromkeys(agents, "0.15:0.9"), reward=reward)
    for seed in range(3):
        for _, rewards, *_ in run_episode(env, 0.0, seed)[1:]:
            assert set(rewards.values()) == {0.0}
        assert env.plan == env.uniform_plan()


@pytest.mark.parametrize("reward", ["step", "final"])
def test_return_is_the_final_potential(make: MakeEnv, reward: str) -> None:
    env = make(reward=reward)
    for seed in range(5):
        record = run_episode(env, np.random.default_rng(seed), seed)
        paid = sum(step[1]["generator"] for step in record[1:])
        final = env.evaluate(env.plan, counted=False).potential
        assert paid == pytest.approx(final, abs=1e-9)
        assert record[-1][4]["generator"]["potential"] == final
        assert final != 0


def test_the_order_of_agents_does_not_matter(make: MakeEnv) -> None:
    budgets = dict.fromkeys(CYCLE, "0.2:0.8")
    one, other = make(CYCLE, budgets), make(CYCLE[::-1], budgets)
    assert other.possible_agents == list(CYCLE[::-1])
    actions = np.random.default_rng(0).uniform(-1, 1, (one.horizon, 4)).astype(np.float32)
    one.reset(seed=5)
    other.reset(seed=5)
    for row in actions:
        moves = {agent: row[i : i + 1] for i, agent in enumerate(CYCLE)}
        for a, b in zip(one.step(moves)[:2], other.step(moves)[:2], strict=True):
            assert_same({k: a[k] for k in CYCLE}, {k: b[k] for k in CYCLE})
        np.testing.assert_array_equal(one.state(), other.state())


def test_sizes_do_not_depend_on_the_networks(make: MakeEnv) -> None:
    small = make(("generator",), channels={"generator": (8, 8)})
    large = make(CYCLE, channels={"generator_A": (64,) * 12})
    for agent in CYCLE:
        assert large.observation_space(agent) == small.observation_space("generator")
        assert large.action_space(agent) == small.action_space("generator")
    assert large.state_space == small.state_space


# --- episodes ----------------------------------------------------------------------------------------


def test_horizon_is_the_longest_lap_and_ends_in_termination(make: MakeEnv) -> None:
    env = make()  # 5 and 3 groups: laps of 4 and 2
    assert env.horizon == 4
    record = run_episode(env, np.random.default_rng(0))
    assert len(record) == 1 + 4
    for step, (_, _, terminated, truncated, *_) in enumerate(record[1:], start=1):
        assert set(terminated.values()) == {step == 4}
        assert set(truncated.values()) == {False}
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step({})


def test_a_network_of_one_group_takes_one_step(make: MakeEnv) -> None:
    env = make(("generator",), channels={"generator": (32,)})
    assert env.horizon == 1
    record = run_episode(env, 1.0)
    assert record[-1][1] == {"generator": 0.0}


def test_step_mode_evaluates_every_step_and_final_mode_once(make: MakeEnv) -> None:
    for reward, per_episode in (("step", 4), ("final", 1)):
        notes = Notes()
        env = make(reward=reward, listener=notes)
        env.prepare()
        assert env.scorer.requests == 0
        for episode in range(1, 4):
            run_episode(env, np.random.default_rng(episode))
            assert env.scorer.requests == per_episode * episode
        assert len(notes.plans) == per_episode * 3
        assert env.scorer.evaluations == len({evaluation.plan for evaluation in notes.plans})


def test_a_repeated_episode_costs_requests_not_evaluations(make: MakeEnv) -> None:
    env = make(evaluations=3)
    for _ in range(3):
        run_episode(env, 0.0)
    assert (env.scorer.evaluations, env.scorer.requests) == (1, 12)
    assert env.scorer.exhausted


def test_reset_scores_nothing_that_counts_and_references_once(make: MakeEnv) -> None:
    env = make()
    assert env.scorer.scorer.calls == []  # construction scores nothing
    env.reset()
    calls = len(env.scorer.scorer.calls)
    assert calls == 64 + 1
    env.reset()
    assert len(env.scorer.scorer.calls) == calls
    assert env.scorer.requests == 0


def test_final_mode_hides_scores_until_the_end(make: MakeEnv) -> None:
    record = run_episode(make(reward="final"), np.random.default_rng(0))
    for observations, rewards, _, _, infos, _ in record[:-1]:
        assert infos["generator"]["scores"] == infos["generator"]["gaps"] == {}
        assert set(rewards.values()) <= {0.0}
        assert observations["generator"][-8:].tolist() == [0.0] * 8  # reward and seven terms
    assert record[-1][0]["generator"][-8:].tolist() == [0.0] * 8
    assert record[-1][4]["generator"]["scores"]
    assert record[-1][1]["generator"] != 0


def test_step_mode_tells_the_agents_what_the_joint_step_did(make: MakeEnv) -> None:
    env = make()
    record = run_episode(env, np.random.default_rng(0))
    fields = slice(-len(FAMILIES), None)
    before, after = record[2][4]["generator"]["scores"], record[3][4]["generator"]["scores"]
    changes = np.clip([after[term] - before[term] for term in after], -2, 2)
    for agent in env.possible_agents:
        np.testing.assert_allclose(record[3][0][agent][fields], changes, rtol=1e-6)
        paid = record[3][0][agent][-len(FAMILIES) - 1]
        assert paid == pytest.approx(np.clip(record[3][1][agent] / env.weights.total, -2, 2), rel=1e-6)


def test_infos_are_json_and_the_same_for_all(make: MakeEnv) -> None:
    env = make()
    for *_, infos, _ in run_episode(env, np.random.default_rng(0)):
        assert infos["generator"] == infos["discriminator"]
        assert set(infos["generator"]) == {"scores", "gaps", "potential", "plan"}
        assert json.loads(json.dumps(infos)) == infos
    assert Plan.from_dict(infos["generator"]["plan"]) == env.plan


def test_every_plan_on_the_way_meets_its_budget(make: MakeEnv) -> None:
    env = make(CYCLE, dict.fromkeys(CYCLE, "0.15:0.9"))
    for seed in range(5):
        for *_, infos, _ in run_episode(env, np.random.default_rng(seed), seed):
            plan = Plan.from_dict(infos["generator_A"]["plan"])
            for agent, network in env.scorer.networks.items():
                assert keep_ratio(network, np.array(plan[agent])) <= env.episode_budgets[agent] * (1 + 1e-9)


def test_reset_takes_budgets(make: MakeEnv) -> None:
    env = make(budgets={"generator": "0.1:0.6"})
    env.reset(seed=0, options={"budgets": {"generator": 0.25}})
    assert env.episode_budgets == {"generator": 0.25, "discriminator": 0.3}
    with pytest.raises(UserError, match=r"outside 0\.1:0\.6"):
        env.reset(options={"budgets": {"generator": 0.7}})
    with pytest.raises(UserError, match="did you mean 'generator'"):
        env.reset(options={"budgets": {"genrator": 0.3}})


# --- whole plans -------------------------------------------------------------------------------------


def test_best_starts_as_uniform_and_keeps_the_best_plan_on_the_way() -> None:
    notes = Notes()
    env = toy_env(listener=notes)
    assert env.best is None
    env.prepare()
    assert env.best is not None
    assert (env.best.plan, env.best.potential) == (env.uniform_plan(), 0.0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        run_episode(env, rng)
    best = max(notes.plans, key=lambda evaluation: evaluation.potential)
    assert env.best == best
    assert best.potential > 0


def test_uniform_stays_best_when_nothing_beats_it(make: MakeEnv) -> None:
    notes = Notes()
    env = make(listener=notes)
    run_episode(env, -1.0)
    assert max(evaluation.potential for evaluation in notes.plans) < 0
    assert env.best is not None
    assert env.best.plan == env.uniform_plan()


def test_best_is_none_where_budgets_are_drawn(make: MakeEnv) -> None:
    env = make(budgets={"generator": "0.1:0.6"})
    run_episode(env, np.random.default_rng(0))
    assert env.best is None


def test_evaluate_scores_whole_plans(make: MakeEnv) -> None:
    notes = Notes()
    env = make(listener=notes)
    rng = np.random.default_rng(0)
    plan = env.plan_from_proportions({a: random_proportions(n, rng) for a, n in env.scorer.networks.items()})
    free = env.evaluate(plan, counted=False)
    assert (env.scorer.requests, notes.plans, notes.episodes) == (0, [], [])
    counted = env.evaluate(plan)
    assert counted == free
    assert (env.scorer.requests, notes.plans) == (1, [counted])
    assert notes.episodes[0].return_ == counted.potential
    assert sum(counted.term_rewards.values()) == pytest.approx(counted.potential)
    assert 0 <= counted.unused["generator"] < 0.2


@pytest.mark.parametrize(
    ("widths", "sentence"),
    [
        ({"generator": (16, 32, 40, 24, 10), "discriminator": (2, 2, 2)}, "keeps 1.0"),
        ({"generator": (3, 2, 2, 2, 2), "discriminator": (2, 2, 2)}, "multiples of 2"),
        ({"generator": (0, 2, 2, 2, 2), "discriminator": (2, 2, 2)}, "multiples of 2"),
        ({"generator": (2, 2), "discriminator": (2, 2, 2)}, "2 widths for 'generator'; it has 5 groups"),
        ({"generator": (2, 2, 2, 2, 2)}, "the environment has generator, discriminator"),
    ],
)
def test_evaluate_refuses_plans_that_are_not_feasible(
    make: MakeEnv, widths: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make().evaluate(Plan.of(widths, "fake"))


def test_proportions_are_needed_for_every_network(make: MakeEnv) -> None:
    with pytest.raises(ValueError, match="needed for generator, discriminator; got generator"):
        make().plan_from_proportions({"generator": np.ones(5)})


def test_ranges_need_a_budget_before_the_first_episode(make: MakeEnv) -> None:
    env = make(budgets={"generator": "0.1:0.6"})
    with pytest.raises(UserError, match="say which one"):
        env.uniform_plan()
    budgets = {"generator": 0.2, "discriminator": 0.3}
    plan = env.uniform_plan(budgets)
    assert env.evaluate(plan, budgets, counted=False).potential == 0.0


def test_episode_rows(make: MakeEnv) -> None:
    notes = Notes()
    env = make(listener=notes)
    for seed in range(2):
        run_episode(env, np.random.default_rng(seed))
    assert [episode.episode for episode in notes.episodes] == [1, 2]
    episode, row = notes.episodes[-1], notes.episodes[-1].row()
    assert json.loads(json.dumps(row)) == row
    assert row["return"] == pytest.approx(row["density"] + row["fidelity"] + row["balance"] + row["recovery"])
    assert row["mmd_gap.reward"] == pytest.approx(row["mmd_gap.score"])
    assert row["generator.budget"] == 0.3
    assert 0.7 <= row["generator.sparsity"] < 0.75
    assert row["generator.sparsity"] == pytest.approx(1 - 0.3 * (1 - row["generator.unused"]))
    assert 0 < row["discriminator.channel_sparsity"] < 1
    assert (row["evaluations"], row["requests"]) == (env.scorer.evaluations, 8)
    assert episode.best_potential == env.best.potential  # type: ignore[union-attr]


def test_weights_weigh(make: MakeEnv) -> None:
    balance_only = make(weights=Weights(0.0, 0.0, 1.0, 0.0))
    run_episode(balance_only, np.random.default_rng(0))
    evaluation = balance_only.evaluate(balance_only.plan, counted=False)
    assert evaluation.potential == evaluation.term_scores["balance_gap"]


# --- wrong input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [[np.nan], [np.inf], [0.0, 0.0], 0.0, []])
def test_wrong_actions_are_refused_and_change_nothing(make: MakeEnv, action: Any) -> None:
    env = make()
    env.reset()
    plan = env.plan
    with pytest.raises(ValueError, match="one finite number"):
        env.step({"generator": np.array([1.0], dtype=np.float32), "discriminator": np.array(action)})
    assert env.plan == plan


def test_every_agent_acts(make: MakeEnv) -> None:
    env = make()
    env.reset()
    with pytest.raises(ValueError, match="one action for each of"):
        env.step({"generator": np.zeros(1, dtype=np.float32)})


def test_wrong_options_are_refused(make: MakeEnv) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        make(budgets={"generator": 0.001})
    with pytest.raises(UserError, match="did you mean 'final'"):
        make(reward="fina")
    scorer = CountedScorer(FakeScorer(make().scorer.networks))
    with pytest.raises(UserError, match="'discriminator' has no budget"):
        PruningEnv(scorer, {"generator": Budget(0.3, 0.3)})
    with pytest.raises(UserError, match="unknown agent"):
        PruningEnv(scorer, {**make().budgets, "critic": Budget(0.3, 0.3)})
    networks = make().scorer.networks
    with pytest.raises(ValueError, match="call it 'discriminator'"):
        PruningEnv(CountedScorer(FakeScorer({"generator": networks["discriminator"]})), {})
    with pytest.raises(RuntimeError, match="before the first reset"):
        make().state()


def test_peers() -> None:
    assert peer_of("generator") == "discriminator"
    assert peer_of("discriminator_B") == "generator_B"


# --- what can be taken away ---------------------------------------------------------------------------

PEER = [i for i, field in enumerate(LOCAL_FIELDS) if "peer" in field.name or "feedback" in field.name]


@pytest.mark.parametrize("reward", ["step", "final"])
def test_without_feedback_agents_see_nothing_of_their_peer(make: MakeEnv, reward: str) -> None:
    told, untold = (make(reward=reward, feedback=feedback) for feedback in (True, False))
    first, second = (run_episode(env, np.random.default_rng(3), seed=0) for env in (told, untold))
    assert len(first) == len(second)
    own = [i for i in range(len(LOCAL_FIELDS)) if i not in PEER]
    hidden = 0.0
    for one, other in zip(first, second, strict=True):
        for agent in told.possible_agents:
            assert not other[0][agent][PEER].any()
            np.testing.assert_array_equal(one[0][agent][own], other[0][agent][own])
            hidden += float(np.abs(one[0][agent][PEER]).sum())
        assert_same(one[1:], other[1:])  # rewards, infos and the critic's state
    assert hidden > 0


@pytest.mark.parametrize("agent", ["generator", "discriminator"])
def test_held_networks_stay_uniform(make: MakeEnv, agent: str) -> None:
    env, free = make(held=(agent,)), make()
    rng = np.random.default_rng(0)
    run_episode(env, rng)
    uniform = env.uniform_plan()
    other = next(name for name in env.possible_agents if name != agent)
    assert env.plan[agent] == uniform[agent]
    assert env.plan[other] != uniform[other]
    proportions = {name: random_proportions(net, rng) for name, net in env.scorer.networks.items()}
    plan, wanted = env.plan_from_proportions(proportions), free.plan_from_proportions(proportions)
    assert (plan[agent], plan[other]) == (uniform[agent], wanted[other])
    assert env.evaluate(wanted) == env.evaluate(plan)
    assert env.evaluate(wanted).plan == plan != wanted


def test_a_held_agents_action_counts_as_0(make: MakeEnv) -> None:
    env, free = make(held=("discriminator",)), make()
    env.reset(seed=0)
    free.reset(seed=0)
    while env.agents:
        one = env.step({"generator": np.array([0.7]), "discriminator": np.array([-0.9])})
        other = free.step({"generator": np.array([0.7]), "discriminator": np.array([0.0])})
        assert_same(one, other)


@pytest.mark.parametrize(
    ("held", "sentence"),
    [(("critic",), "unknown agent to hold"), (("generator", "discriminator"), "leave one free")],
)
def test_held_agents_exist_and_are_not_all(make: MakeEnv, held: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(held=held)
