from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from agents.elites import ElitePPO, Remembered, uniform_episode
from agents.learning import private_randomness
from agents.mappo import Mappo, TeamPolicy
from agents.vec_env import TeamVecEnv
from envs.pruning_env import PruningEnv, Reward
from envs.toy import toy_env
from gan.errors import UserError
from tests.agents.conftest import Recorded


def rolled_out(reward: Reward = "final", episodes: int = 3, **options: object) -> tuple[ElitePPO, PruningEnv]:
    """A trainer after its first rollout and update, and its environment."""
    env = toy_env(1000, reward)
    with private_randomness():
        ppo = Mappo(episodes=episodes, **options)._build_ppo(TeamVecEnv(env))
        ppo.learn(1)
    return ppo, env


def watched(agent: Mappo, look: Callable[[TeamPolicy], float]) -> list[tuple[int, float]]:
    """Let an agent search for 80 evaluations; what its policy looked like at each of them."""
    env = toy_env(80, "final")
    seen: list[tuple[int, float]] = []

    class Watch:
        def on_plan(self, evaluation: object) -> None:
            assert agent.policy is not None
            seen.append((env.scorer.evaluations, look(agent.policy)))

        def on_episode(self, episode: object) -> None:
            pass

    env.listener = Watch()  # type: ignore[assignment]
    agent.learn(env)
    return seen


@pytest.mark.parametrize("reward", ["final", "step"])
def test_episodes_are_remembered_as_they_were_played(reward: Reward) -> None:
    env = toy_env(1000, reward)
    slots = TeamVecEnv(env)
    played: list[tuple[np.ndarray, float]] = []
    original = slots.step_wait

    def watched() -> object:
        actions = slots._actions
        assert actions is not None
        result = original()
        played.append((actions.copy(), float(result[1][0])))
        return result

    slots.step_wait = watched  # type: ignore[method-assign, assignment]
    with private_randomness():
        ppo = Mappo(episodes=3)._build_ppo(slots)
        ppo.learn(1)
    horizon, agents = env.horizon, slots.num_envs
    assert len(ppo.episodes) == 3
    for number, episode in enumerate(ppo.episodes):
        steps = played[number * horizon : (number + 1) * horizon]
        acted = np.concatenate([actions for actions, _ in steps])
        np.testing.assert_allclose(episode.actions.numpy().clip(-1, 1), acted, atol=1e-6)
        to_come = np.cumsum([paid for _, paid in steps][::-1])[::-1]
        np.testing.assert_allclose(episode.returns.numpy(), np.repeat(to_come, agents), rtol=1e-4, atol=1e-5)
        assert all(len(values) == horizon * agents for values in episode.observations.values())


def test_the_best_are_those_above_what_the_critic_expects() -> None:
    ppo, _ = rolled_out(episodes=4)
    totals = [episode.total for episode in ppo.episodes]
    assert [episode.total for episode in ppo.best(4)] == sorted(totals, reverse=True)  # one budget, one start

    # A start that the critic expects more of: the same return is less of a surplus there.
    poor = ppo.episodes[int(np.argmin(totals))]
    richer = {part: values + 3.0 for part, values in poor.observations.items()}

    def expected(observations: dict[str, torch.Tensor]) -> float:
        first = {part: values[:1] for part, values in observations.items()}
        with torch.no_grad():
            return float(ppo.policy.predict_values(first))

    gain = expected(richer) - expected(poor.observations)
    twins = [poor, Remembered(richer, poor.actions, poor.returns)]
    ppo.episodes = twins
    assert ppo.best(1)[0] is twins[0 if gain > 0 else 1]
    assert gain != 0


def test_imitation_makes_the_best_episodes_likelier_and_leaves_the_critic_alone() -> None:
    ppo, _ = rolled_out(episodes=6)
    best = ppo.best(2)
    observations = {part: torch.cat([e.observations[part] for e in best]) for part in best[0].observations}
    actions = torch.cat([episode.actions for episode in best])
    returns = torch.cat([episode.returns for episode in best])
    with torch.no_grad():
        surplus = (returns - ppo.policy.predict_values(observations).flatten()).clamp(min=0)
    assert surplus.max() > 0

    def likelihood() -> float:
        """Of what came to more than the critic expects, by how much more."""
        with torch.no_grad():
            found = ppo.policy.evaluate_actions(observations, actions)[1]
        return float((surplus * found).sum() / surplus.sum())

    critic = [parameter.clone() for parameter in ppo.policy.mlp_extractor.critic.parameters()]
    before = likelihood()
    with private_randomness():
        for _ in range(5):
            ppo._imitate(best)
    assert likelihood() > before
    after = ppo.policy.mlp_extractor.critic.parameters()
    assert all(torch.equal(old, new) for old, new in zip(critic, after, strict=True))


def test_of_many_episodes_the_best_stay(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.elites.MOST", 5)
    env, recorder = recorded(1000, reward="final")
    with private_randomness():
        ppo = Mappo(episodes=4, elites=2)._build_ppo(TeamVecEnv(env))
        ppo.learn(3 * 4 * env.horizon * 2)
    returns = [episode.return_ for episode in recorder.episodes]
    assert len(returns) == 12
    assert sorted(episode.total for episode in ppo.episodes) == pytest.approx(sorted(returns)[-5:], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"reward": "final"},
        {"reward": "step"},
        {"budgets": {"generator": "0.2:0.5", "discriminator": "0.3:0.6"}},
        {"held": ("discriminator",), "feedback": False},
    ],
)
def test_pruning_uniformly_is_an_episode_that_costs_nothing(options: dict[str, Any]) -> None:
    env = toy_env(1000, **{"reward": "final", **options})
    env.prepare()
    before = env.scorer.evaluations, env.scorer.requests, env.best
    episode = uniform_episode(env, seed=0)
    assert (env.scorer.evaluations, env.scorer.requests, env.best) == before
    rows = env.horizon * len(env.possible_agents)
    assert episode.actions.shape == (rows, 1)
    assert not episode.actions.any()
    np.testing.assert_allclose(episode.returns.numpy(), np.zeros(rows), atol=1e-6)
    assert {part: len(values) for part, values in episode.observations.items()} == {
        "local": rows,
        "state": rows,
    }
    # what an episode that is played sees first, too
    slots = TeamVecEnv(env)
    slots.seed(0)
    for part, values in slots.reset().items():
        np.testing.assert_array_equal(episode.observations[part][: len(values)].numpy(), values)


@pytest.mark.parametrize(("options", "known"), [({}, 1), ({"elites": 0}, 0)])
def test_a_memory_begins_with_pruning_uniformly(
    options: dict[str, int], known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any episode of its own; again where a policy that is known goes on."""
    remembered: list[int] = []
    original = ElitePPO.train

    def told(self: ElitePPO) -> None:
        remembered.append(len(self.episodes))
        original(self)

    monkeypatch.setattr(ElitePPO, "train", told)
    agent = Mappo(episodes=2, **options)  # type: ignore[arg-type]
    for _ in range(2):
        remembered.clear()
        agent.learn(toy_env(4, "final"))
        assert remembered[0] == known


def test_a_policy_whose_episodes_are_all_worse_is_led_back_to_uniform_pruning() -> None:
    ppo, env = rolled_out(episodes=1)
    uniform = uniform_episode(env, seed=0)
    with private_randomness():
        with torch.no_grad():
            ppo.policy.action_net.bias.fill_(0.9)  # type: ignore[union-attr]
        astray = [
            Remembered(uniform.observations, torch.full_like(uniform.actions, 0.9), uniform.returns - worse)
            for worse in (8.0, 9.0, 10.0)
        ]
        ppo.episodes = [*astray, uniform]
        ppo._recent.clear()
        ppo._recent.extend(episode.total for episode in astray)
        with torch.no_grad():  # the critic expects what was met
            for parameter in ppo.policy.value_net.parameters():
                parameter.zero_()
            ppo.policy.value_net.bias.fill_(-9.0)
        assert ppo.best(1) == [uniform]
        for _ in range(40):
            ppo._imitate(ppo.best(4))
        actions, _ = ppo.policy.predict(  # type: ignore[misc]
            {part: values.numpy() for part, values in uniform.observations.items()}, deterministic=True
        )
    assert np.abs(actions).mean() < 0.3


def test_without_elites_nothing_is_remembered() -> None:
    for options in ({"elites": 0}, {"imitation": 0}):
        ppo, _ = rolled_out(**options)
        assert ppo.episodes == []


def test_actions_vary_more_only_while_the_search_is_young() -> None:
    agent = Mappo(episodes=4, explore=0.2, wide=0.9, std=0.3, learning_rate=1e-9, imitation=0)
    deviations = watched(agent, lambda policy: float(policy.log_std.detach().exp()))
    young = [deviation for evaluations, deviation in deviations if evaluations <= 16]
    old = [deviation for evaluations, deviation in deviations if evaluations > 16 + 4]
    assert young == pytest.approx([0.9] * len(young), rel=1e-4)
    assert old == pytest.approx([0.3] * len(old), rel=1e-4)
    assert young
    assert old


def test_actions_vary_alike_while_the_search_is_young() -> None:
    agent = Mappo(episodes=4, explore=0.2)

    def size(policy: TeamPolicy) -> float:
        assert policy.std_net is not None
        return float(policy.std_net.weight.detach().abs().max())

    seen = watched(agent, size)
    assert {largest for evaluations, largest in seen if evaluations <= 16} == {0.0}
    assert seen[-1][1] > 0
    # One that is known learns them from the start.
    known = agent.policy
    assert known is not None
    agent.learn(toy_env(30, "final"))
    assert agent.policy is not None
    assert agent.policy.std_net is not None
    assert agent.policy.std_net.weight.requires_grad
    assert not torch.equal(agent.policy.std_net.weight, known.std_net.weight)  # type: ignore[union-attr]


def test_a_policy_that_has_learned_keeps_its_own_deviation() -> None:
    agent = Mappo(episodes=2)
    agent.learn(toy_env(60, "final"))
    assert agent.policy is not None
    learned = float(agent.policy.log_std.detach())
    agent.learn(toy_env(1, "final"))  # too short for an update
    assert float(agent.policy.log_std.detach()) == learned


@pytest.mark.parametrize(
    "options", [{"elites": -1}, {"imitation": -1}, {"explore": 1.5}, {"wide": 0.0}, {"entropy": -0.1}]
)
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Mappo(**options)
