from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.learning import private_randomness
from agents.registry import build_agent, resolve_agent
from agents.sb3 import Sb3, Stage
from agents.tensorboard import EpisodeLog
from agents.vec_env import NormalBox, joint_outline
from envs.joint_env import JointPruningEnv
from envs.pruning_env import Reward
from envs.toy import toy_env, toy_optimum
from gan.errors import UserError
from gan.evaluations import EvaluationLog
from tests.agents.conftest import Recorded, Recorder, best_scores

NAMED = ("ppo", "a2c", "sac", "td3", "ddpg")
BY_PATH = ("stable_baselines3.PPO", "sb3_contrib.TQC", "sb3_contrib.ARS")
SMALL: dict[str, Any] = {"episodes": 2, "hidden": [8]}


@pytest.mark.parametrize("reward", ["step", "final"])
@pytest.mark.parametrize("name", [*NAMED, *BY_PATH])
def test_it_ends_with_its_evaluations(name: str, reward: str, recorded: Recorded) -> None:
    env, recorder = recorded(17, reward=reward)
    agent = build_agent(name, **SMALL)
    agent.learn(env)
    *searched, proposed = recorder.keys
    assert proposed == agent.propose(env).key  # what the last evaluation is for, if it is new
    assert env.scorer.evaluations == len({*searched, proposed}) <= 17
    assert len(searched) <= 4 * 16
    if len(searched) < 4 * 16:  # ended by new plans, right at the last one
        assert len(set(searched)) == 16
        assert searched[-1] not in searched[:-1]
    if reward == "final":
        assert len(recorder.plans) == len(recorder.episodes)


@pytest.mark.parametrize("name", BY_PATH)
def test_any_algorithm_comes_back(name: str, recorded: Recorded, tmp_path: Path) -> None:
    env, _ = recorded(30)
    agent = build_agent(name, **SMALL, learning_rate=0.05)
    agent.learn(env)
    proposed = agent.propose(env)
    agent.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = build_agent(name, seed=7)
    again.load(tmp_path)
    assert again.propose(env) == proposed


def test_a_recurrent_policy_remembers_while_it_proposes(recorded: Recorded, tmp_path: Path) -> None:
    env, _ = recorded(12)
    name, lstm = "sb3_contrib.RecurrentPPO", {"lstm_hidden_size": 4}
    agent = build_agent(name, **SMALL, learning_rate=0.05, policy_kwargs=lstm, n_epochs=2)
    agent.learn(env)
    agent.save(tmp_path)
    again = build_agent(name)
    again.load(tmp_path)
    assert again.propose(env) == agent.propose(env)


@pytest.mark.parametrize("name", NAMED)
def test_it_starts_at_uniform(name: str) -> None:
    """The means of an untrained policy are 0, whatever it sees."""
    agent = build_agent(name)
    assert isinstance(agent, Sb3)
    policy = agent._build(joint_outline(2), horizon=2).policy
    seen = joint_outline(2).observation_space.sample()
    action, _ = policy.predict(seen, deterministic=True)
    assert np.abs(action).max() == 0


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_training_goes_on_from_a_loaded_policy(name: str, recorded: Recorded, tmp_path: Path) -> None:
    env, _ = recorded(60)
    agent = build_agent(name, **SMALL, learning_rate=0.02)
    agent.learn(env)
    assert agent.propose(env) != env.uniform_plan()
    agent.save(tmp_path)
    warm = build_agent(name, seed=1)
    warm.load(tmp_path)
    short, _ = recorded(2)  # too short for an update
    warm.learn(short)
    assert warm.propose(env) == agent.propose(env)


@pytest.mark.parametrize("name", ["ppo", "td3"])
def test_an_interrupted_search_goes_on_from_its_log(name: str, tmp_path: Path) -> None:
    def search(path: Path) -> list[str]:
        recorder = Recorder()
        log = EvaluationLog(path, toy_env().scorer.scorer.fingerprint)
        env = toy_env(30, "final", log=log, listener=recorder)
        build_agent(name, **SMALL).learn(env)
        assert env.scorer.replay_left is None
        return recorder.keys

    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    keys = search(whole)
    torn.write_text(whole.read_text()[: whole.stat().st_size // 2])
    assert search(torn) == keys


@pytest.mark.parametrize("name", ["ppo", "td3"])
def test_the_global_generators_are_left_alone(name: str, recorded: Recorded) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = draw()
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])
    env, _ = recorded(20)
    build_agent(name, seed=4, **SMALL).learn(env)
    assert draw() == expected


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_tensorboard_has_every_episode_once_and_nothing_is_printed(
    name: str, recorded: Recorded, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    env, recorder = recorded(40)
    build_agent(name, tensorboard=tmp_path, **SMALL).learn(env)
    assert capfd.readouterr() == ("", "")
    events = EventAccumulator(str(tmp_path)).Reload()
    returns = events.Scalars("episode/return")
    assert [event.step for event in returns] == [e.evaluations for e in recorder.episodes]
    np.testing.assert_allclose(
        [event.value for event in returns], [e.return_ for e in recorder.episodes], rtol=1e-5
    )
    assert [tag for tag in events.Tags()["scalars"] if tag.startswith("train/")]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("sb3_contrib.QRDQN", "no continuous actions"),
        ("sb3_contrib.MaskablePPO", "no continuous actions"),
        ("nothing_here.PPO", "cannot be imported"),
        ("stable_baselines3.PP", "did you mean 'PPO'"),
        ("json.JSONDecoder", "is no algorithm"),
        ("stable_baselines3.HerReplayBuffer", "is no algorithm"),
        (".PPO", "cannot be imported"),
        ("stable_baselines3..PPO", "cannot be imported"),
    ],
)
def test_what_cannot_steer_is_refused(path: str, sentence: str) -> None:
    assert resolve_agent(path) == path
    with pytest.raises(UserError, match=sentence):
        build_agent(path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"episodes": 0}, "episodes is 0"),
        ({"std": 0.0}, "std is 0"),
        ({"hidden": [0]}, "hidden is"),
        ({"hidden": 3}, "hidden is"),
        ({"learning_rate": "fast"}, "refuses its options"),
        ({"learning_rate": lambda _: 1.0}, "no plain value"),
        ({"device": "cuda"}, "unknown option"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_agent("ppo", **options)


def test_keywords_of_the_class_are_options_and_come_back(tmp_path: Path) -> None:
    agent = build_agent("ppo", clip_range=0.1, hidden=[8], policy_kwargs={"ortho_init": False})
    agent.save(tmp_path)
    again = build_agent("ppo")
    again.load(tmp_path)
    model = again._build(joint_outline(3), horizon=4)
    assert model.clip_range(1.0) == 0.1
    assert model.n_steps == 4 * 8
    assert not model.policy.ortho_init
    assert model.policy.mlp_extractor.policy_net[0].out_features == 8


def test_a_policy_of_other_sizes_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    env, _ = recorded(20)
    agent = build_agent("ppo", **SMALL)
    agent.learn(env)
    agent.save(tmp_path)
    path = tmp_path / "agent.json"
    whole = json.loads(path.read_text())
    fresh = build_agent("ppo")
    for change, sentence in (
        ({"agents": 3}, "does not fit"),
        ({"options": {"hidden": [9]}}, "does not fit"),
        ({"options": 3}, "no readable options"),
        ({"local": ["mood"]}, "other local observations"),
        ({"largest_move": 3.0}, "factor 3.0"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=sentence):
            fresh.load(tmp_path)
    assert fresh.options.hidden == (64, 64)  # a refused folder changes nothing
    agent.agents = 4
    with pytest.raises(UserError, match="moves 4 networks"):
        agent.propose(env)


def test_random_actions_stay_around_uniform() -> None:
    box = NormalBox(2, 0.2)
    box.seed(0)
    drawn = np.array([box.sample() for _ in range(500)])
    assert box.contains(drawn[0])
    assert drawn.std() == pytest.approx(0.2, rel=0.1)
    assert joint_outline(2).observation_space == JointPruningEnv(toy_env()).observation_space


@pytest.mark.parametrize(("reward", "expected"), [("final", 3 * 4), ("step", 3)])
def test_off_policy_learners_begin_after_as_many_scored_plans(reward: Reward, expected: int) -> None:
    agent = build_agent("sac", episodes=3)
    assert isinstance(agent, Sb3)
    env = toy_env(8, reward)
    with private_randomness():
        model = agent._build(Stage(env, EpisodeLog(None), 0.4), horizon=4)
        assert isinstance(model, SAC)
        assert (model.learning_starts, model.gradient_steps) == (expected, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_controllers_beat_random_search_at_equal_evaluations(name: str) -> None:
    """Best of 300 plans under the default reward: two seeds beat random by half the way up."""
    random_ = np.mean(best_scores("random", 2, "final"))
    assert min(best_scores(name, 2, "final")) > random_ + 0.5 * (toy_optimum(toy_env()).potential - random_)


def test_a_class_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "own_algorithm.py").write_text("from stable_baselines3 import PPO\nclass Mine(PPO): pass\n")
    (tmp_path / "own_defect.py").write_text("1 / 0\n")
    assert build_agent("own_algorithm.Mine").name == "own_algorithm.Mine"
    with pytest.raises(
        UserError, match=r"own_defect\.X' does not run \(ZeroDivisionError: .*own_defect\.py, line 1"
    ):
        build_agent("own_defect.X")
