from __future__ import annotations

import sys
import types
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from envs.budget import Budget
from envs.observations import STATE_FIELDS
from envs.toy import ToyScorer, toy_scorer
from gan.errors import UserError
from gan.evaluations import EvaluationLog


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the named tasks; remembers what was asked for."""
    asked: list[Any] = []

    class Task:
        networks: ClassVar = {"generator": None, "discriminator": None}

        def surrogate(self, cost: str, budgets: dict[str, tuple[float, float]]) -> str:
            return f"surrogate for {cost} {budgets}"

        def scorer(self, **options: Any) -> ToyScorer:
            asked.append(options)
            return toy_scorer()

    def load_task(name: str) -> Task:
        asked.append(name)
        return Task()

    module = types.ModuleType("gan.tasks")
    module.load_task = load_task  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gan.tasks", module)
    return asked


def test_make_env_hands_its_options_on(asked: list[Any], tmp_path) -> None:
    log = EvaluationLog(tmp_path / "evaluations.jsonl", toy_scorer().fingerprint)
    env = envs.make_env(
        "pairs", budget="0.2", cost="params", start="dense", evaluations=7, log=log, reward="final"
    )
    assert asked == ["pairs", {"cost": "params", "start": "dense", "surrogate": None}]
    assert env.budgets == {"generator": Budget(0.2, 0.2), "discriminator": Budget(0.5, 0.5)}
    assert (env.scorer.limit, env.scorer.log, env.reward) == (7, log, "final")


def test_make_env_asks_for_predictions_at_its_budgets(asked: list[Any]) -> None:
    envs.make_env("pairs", budget="generator=0.2,discriminator=0.3:0.4", cost="macs")
    wanted = {"generator": (0.2, 0.2), "discriminator": (0.3, 0.4)}
    assert asked[1]["surrogate"] == f"surrogate for macs {wanted}"


@pytest.mark.parametrize(
    ("budget", "generator", "discriminator"),
    [
        (None, (0.1, 0.1), (0.5, 0.5)),
        (0.3, (0.3, 0.3), (0.5, 0.5)),
        ("0.05:0.2", (0.05, 0.2), (0.5, 0.5)),
        ({"discriminator": 0.4}, (0.1, 0.1), (0.4, 0.4)),
        ({"generator": Budget(0.1, 0.2), "discriminator": "0.3:0.4"}, (0.1, 0.2), (0.3, 0.4)),
    ],
)
def test_budgets_come_in_many_forms(
    asked: list[Any], budget: Any, generator: Any, discriminator: Any
) -> None:
    env = envs.make_env(budget=budget)
    assert env.budgets == {"generator": Budget(*generator), "discriminator": Budget(*discriminator)}


@pytest.mark.parametrize("budget", ["abc", "0", "1.5", "critic=0.1", {"critic": 0.1}, 1e-6, "0.2:0.1"])
def test_wrong_budgets_are_one_sentence(asked: list[Any], budget: Any) -> None:
    with pytest.raises(UserError) as error:
        envs.make_env(budget=budget)
    assert "\n" not in str(error.value)


def test_registered_ids(asked: list[Any]) -> None:
    real = gymnasium.make("envs:GanPruning-v0", task="pairs", budget=0.2)
    assert asked[0] == "pairs"
    toy = gymnasium.make("envs:GanPruningToy-v0", reward="final")
    for env in (real, toy):
        observation, _ = env.reset(seed=0)
        assert env.observation_space.contains(observation)
        *_, terminated, truncated, _ = env.step(np.zeros(2, dtype=np.float32))
        assert (terminated, truncated) == (False, False)
    assert toy.unwrapped.pruning.reward == "final"  # type: ignore[attr-defined]
    check_env(toy.unwrapped)


def test_both_directions_of_a_translator_are_four_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each direction has its own scorer; a team of four is paid the mean of both."""
    import gan.two_way

    class Both:
        networks: ClassVar = dict.fromkeys(gan.two_way.FOUR_AGENTS)

        def surrogate(self, *_: object) -> None:
            return None

        def scorer(self, **_: object) -> gan.two_way.TwoWayScorer:
            return gan.two_way.TwoWayScorer({"A": toy_scorer(), "B": toy_scorer()})

    monkeypatch.setattr(gan.two_way, "load_two_way", lambda name: Both())
    env = envs.make_env("noto_and_twemoji", budget="0.2")
    env.reset(seed=0)
    assert tuple(env.possible_agents) == gan.two_way.FOUR_AGENTS
    total, shapes = 0.0, set()
    while env.agents:
        observations, rewards, _, _, infos = env.step({agent: np.array([0.5]) for agent in env.agents})
        total += rewards["generator_A"]
        shapes |= {row.shape for row in observations.values()}
    assert len(shapes) == 1
    assert total == pytest.approx(infos["generator_A"]["potential"])
    slots = [field.name for field in STATE_FIELDS if field.name.endswith(".mask")]
    state = dict(zip((field.name for field in STATE_FIELDS), env.state(), strict=True))
    assert [state[name] for name in slots] == [1, 1, 1, 1]


def test_parts_can_be_taken_away(asked: list[Any]) -> None:
    for env in (
        envs.make_env("pairs", feedback=False, held=("discriminator",)),
        envs.toy_env(feedback=False, held=("discriminator",)),
        envs.make_joint_env(task="pairs", feedback=False, held=("discriminator",)).pruning,
    ):
        assert (env.feedback, env.held) == (False, frozenset({"discriminator"}))
    assert (envs.toy_env().feedback, envs.toy_env().held) == (True, frozenset())
