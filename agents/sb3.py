"""Any algorithm of stable-baselines3 or sb3-contrib as one controller of all networks."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from agents.base import (
    check_limited,
    read_description,
    read_options,
    rehearse,
    resolve_budgets,
    write_description,
)
from agents.learning import (
    ENDLESS,
    GAE_LAMBDA,
    WEIGHTS,
    batch_size,
    check_interface,
    describe_interface,
    last_for_the_proposal,
    misfit,
    private_randomness,
)
from agents.tensorboard import EpisodeLog
from agents.vec_env import NormalBox, joint_outline
from envs.joint_env import JointPruningEnv, Vector
from envs.pruning_env import PruningEnv
from gan.checkpoints import load_tensors, save_tensors
from gan.errors import UserError, unknown
from gan.factories import import_here
from gan.plans import Plan

ALGORITHMS: dict[str, str] = {
    "ppo": "stable_baselines3.PPO",
    "a2c": "stable_baselines3.A2C",
    "sac": "stable_baselines3.SAC",
    "td3": "stable_baselines3.TD3",
    "ddpg": "stable_baselines3.DDPG",
}
"""Name in the registry → class."""

WIRING = (
    *("self", "policy", "env", "device", "seed", "tensorboard_log", "verbose", "_init_setup_model"),
    "action_noise",
)
"""Keywords of SB3's classes that are set here."""

NOISY = ("stable_baselines3.TD3", "stable_baselines3.DDPG")
"""Deterministic policies: they explore by Gaussian noise on their actions."""

MINIBATCHES = 4
"""Parts that a rollout is split into, where the class has minibatches."""


@dataclass(frozen=True)
class ControllerOptions:
    """Options of :class:`Sb3` beside the keywords of the algorithm's class.

    Attributes:
        episodes: before the first update, and between updates of an on-policy learner; ≥ 1. SB3's defaults
            (2,048 steps a rollout, 100 random steps) are made for a thousand times as many steps. Off-policy
            learners mean plans that were scored: under ``step`` every step scores one.
        std: standard deviation of the first actions, > 0; 1 is a move by the factor
            ``envs.budget.LARGEST_MOVE``.
        hidden: widths of the hidden layers of every network.
    """

    episodes: int = 8
    std: float = 0.25
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise UserError(f"episodes is {self.episodes}; it must be 1 or more")
        if not 0 < self.std < math.inf:
            raise UserError(f"std is {self.std}; it must be above 0 and finite")
        widths = self.hidden if isinstance(self.hidden, list | tuple) else [0]
        if not all(isinstance(width, int) and width >= 1 for width in widths):
            raise UserError(f"hidden is {self.hidden}; it lists widths of layers, each 1 or more")


ON_POLICY: dict[str, Any] = {"learning_rate": 3e-3}
OFF_POLICY: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 64,
    "buffer_size": 50_000,  # SB3's million would take gigabytes for steps that a search never takes
    "gradient_steps": 4,  # plans are dear and updates cheap: with 1 a search ends before the critic knows
}
SLOW_ACTOR = {"episodes": 40, "gradient_steps": 8, "policy_delay": 4, "std": 0.4}
TUNED: dict[str, dict[str, Any]] = {
    "stable_baselines3.A2C": {"episodes": 4, "use_rms_prop": False, "normalize_advantage": True},
    # without entropy to hold them back they follow a young critic to the corners of the box
    "stable_baselines3.TD3": SLOW_ACTOR,
    "stable_baselines3.DDPG": SLOW_ACTOR,
}
"""Defaults by family and by class, where they differ from SB3's; a keyword that a class lacks is left out."""


class Sb3:
    """One controller, which sees what all agents and the critic see, and moves a group of every network.

    What multi-agent learners are compared with, on the joint view (:class:`envs.joint_env.JointPruningEnv`).
    The actions' mean is 0 to begin with: uniform pruning.

    Args:
        seed: of weights, actions and budgets drawn.
        name: of ``ALGORITHMS``, or the import path of a class, such as ``sb3_contrib.TQC``.
        tensorboard: folder for event files; None writes none.
        options: fields of :class:`ControllerOptions`, and keywords of the class that JSON can hold.

    Raises:
        UserError: if there is no such class, it is no SB3 algorithm or has no continuous actions, or an
            option is unknown or impossible.
    """

    def __init__(
        self, seed: int = 0, *, name: str = "ppo", tensorboard: Path | None = None, **options: Any
    ) -> None:
        self.name = name
        self.seed = seed
        self.tensorboard = tensorboard
        self.path = ALGORITHMS.get(name, name)
        self.algorithm = find_algorithm(self.path)
        self.options, self.keywords = self._read_options(options)
        self.policy: BasePolicy | None = None
        self.agents = 0
        with private_randomness():
            self._build(joint_outline(2), horizon=2)  # a wrong option is refused before a search begins

    def learn(self, env: PruningEnv) -> None:
        check_limited(env, self.name)
        self._check_agents(env)
        log = EpisodeLog(self.tensorboard)
        try:
            with last_for_the_proposal(env, self, log), private_randomness(), suppress(Spent):
                model = self._build(Stage(env, log, self.options.std), env.horizon, self.policy)
                model.set_logger(log.logger)
                self.policy, self.agents = model.policy, len(env.possible_agents)
                # log_interval: SB3 would add its own rows, over steps instead of evaluations
                model.learn(ENDLESS, log_interval=None)  # type: ignore[arg-type]
        finally:
            log.close()

    def propose(self, env: PruningEnv, budgets: Mapping[str, float] | None = None) -> Plan:
        """The last plan of an episode of the policy's means; uniform before it has learned.

        Raises:
            UserError: if the policy was trained on another number of networks.
        """
        if self.policy is None:
            return env.uniform_plan(budgets)
        self._check_agents(env)
        stage = JointPruningEnv(rehearse(env))
        seen, _ = stage.reset(options={"budgets": resolve_budgets(env, budgets)})
        self.policy.set_training_mode(False)
        memory, first, done = None, np.ones(1, dtype=bool), False
        while not done:
            action, memory = self.policy.predict(seen, memory, first, deterministic=True)
            seen, _, done, _, _ = stage.step(action)
            first = np.zeros(1, dtype=bool)
        return stage.pruning.plan

    def save(self, folder: Path) -> None:
        content = {
            "seed": self.seed,
            "algorithm": self.path,
            "options": {**asdict(self.options), **self.keywords},
            "agents": self.agents,
            **describe_interface(),
        }
        write_description(folder, self.name, content)
        if self.policy is not None:
            save_tensors(folder / WEIGHTS, self.policy.state_dict())

    def load(self, folder: Path) -> None:
        content = read_description(folder, self.name)
        check_interface(folder, content)
        try:
            found, agents = dict(content["options"]), int(content["agents"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder} holds no readable options ({error}); train the agent again") from error
        before = self.options, self.keywords
        self.options, self.keywords = self._read_options(found)
        policy: BasePolicy | None = None
        try:
            if agents:
                tensors = load_tensors(folder / WEIGHTS)
                with private_randomness():
                    policy = self._build(joint_outline(agents), horizon=2).policy
                policy.load_state_dict(tensors)
        except (RuntimeError, UserError) as error:
            self.options, self.keywords = before
            if isinstance(error, UserError):
                raise
            raise misfit(folder, error) from error
        self.policy, self.agents = policy, agents

    def _check_agents(self, env: PruningEnv) -> None:
        if self.policy is not None and self.agents != len(env.possible_agents):
            raise UserError(
                f"this {self.name} policy moves {self.agents} networks at once, the environment has "
                f"{len(env.possible_agents)}; train another one"
            )

    def _read_options(self, given: Mapping[str, Any]) -> tuple[ControllerOptions, dict[str, Any]]:
        """Own options, and the keywords of the algorithm's class."""
        known = [key for key in keywords_of(self.algorithm) if key not in WIRING]
        own = [field.name for field in fields(ControllerOptions)]
        for key in given:
            if key not in known and key not in own:
                raise unknown(f"option of {self.name!r}", key, [*own, *known])
        try:
            plain = json.loads(json.dumps(given))
        except (TypeError, ValueError) as error:
            raise UserError(f"an option of {self.name!r} is no plain value: {error}") from error
        tuned = {**TUNED.get(self.path, {}), **plain}
        options = read_options(ControllerOptions, self.name, {k: v for k, v in tuned.items() if k in own})
        return options, {key: value for key, value in plain.items() if key not in own}

    def _build(self, env: Any, horizon: int, known: BasePolicy | None = None) -> BaseAlgorithm:
        """The algorithm on an environment, with the weights of a known policy; seeds SB3's randomness.

        Raises:
            UserError: if it refuses its options, or has no continuous actions.
        """
        defaults = self._defaults(env, horizon)
        arguments = {**defaults, **self.keywords}
        # recurrent algorithms have an MlpLstmPolicy instead
        policy = next(
            (name for name in sorted(self.algorithm.policy_aliases, key=len) if name[:3] == "Mlp"), ""
        )
        try:
            arguments["policy_kwargs"] = defaults["policy_kwargs"] | self.keywords.get("policy_kwargs", {})
            model = self.algorithm(policy, env, seed=self.seed, device="cpu", **arguments)  # type: ignore[call-arg]
        except (AssertionError, TypeError, ValueError) as error:
            if "action space" in str(error):  # how SB3 refuses spaces
                raise UserError(
                    f"{self.path} gives no continuous actions, as keep ratios are; take another one ({error})"
                ) from error
            raise UserError(f"{self.path} refuses its options: {error}") from error
        if known is None:
            settle(model.policy, self.options.std)
        else:
            model.policy.load_state_dict(known.state_dict())
        return model

    def _defaults(self, env: Any, horizon: int) -> dict[str, Any]:
        """Keywords that the algorithm's class has, where ours differ from SB3's."""
        steps, size = horizon * self.options.episodes, env.action_space.shape[0]
        found: dict[str, Any] = {"gamma": 1.0, "policy_kwargs": {"net_arch": list(self.options.hidden)}}
        if issubclass(self.algorithm, OnPolicyAlgorithm):
            found |= ON_POLICY | {"n_steps": steps, "batch_size": batch_size(steps, MINIBATCHES)}
            found["gae_lambda"] = GAE_LAMBDA[env.pruning.reward if isinstance(env, Stage) else "step"]
        elif issubclass(self.algorithm, OffPolicyAlgorithm):
            each_scored = isinstance(env, Stage) and env.pruning.reward == "step"
            found |= OFF_POLICY | {"learning_starts": self.options.episodes if each_scored else steps}
        found |= TUNED.get(self.path, {})
        noise = NormalActionNoise(np.zeros(size), np.full(size, self.options.std))
        if self.path in NOISY:
            found["action_noise"] = noise
        known = keywords_of(self.algorithm)
        return {key: value for key, value in found.items() if key in known}


class Spent(Exception):
    """The evaluations are spent; leaves an algorithm's loop, whatever it looks like."""


class Stage(JointPruningEnv):
    """The joint view in a search: it ends with the evaluations, and logs every finished episode.

    Args:
        pruning: the environment.
        log: takes the episodes.
        std: standard deviation of random actions, of which off-policy learners take some before they learn.
            Actions all over the box would be plans far worse than any that a learner starts from.
    """

    def __init__(self, pruning: PruningEnv, log: EpisodeLog, std: float) -> None:
        super().__init__(pruning)
        self.log = log
        self.action_space = NormalBox(len(pruning.possible_agents), std)  # type: ignore[assignment]

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """Move one group of every network.

        Raises:
            Spent: before a plan that nobody has evaluations for.
        """
        scorer = self.pruning.scorer
        if scorer.exhausted:
            raise Spent
        result = super().step(action)
        if result[2]:
            self.log.record(scorer.evaluations, result[4]["potential"], result[4]["scores"])
        return result


def find_algorithm(path: str) -> type[BaseAlgorithm]:
    """The class at an import path; its module may lie in the working folder.

    Raises:
        UserError: if the module or the class is missing, or it is no SB3 algorithm.
    """
    module_name, _, name = path.rpartition(".")
    advice = "give the path of a class, such as stable_baselines3.PPO, or install its package"
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"the algorithm {path!r} cannot be imported; {advice}")
    module = import_here(module_name, f"the algorithm {path!r}", advice)
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, BaseAlgorithm):
        return found
    classes = [n for n, o in vars(module).items() if isinstance(o, type) and issubclass(o, BaseAlgorithm)]
    if found is None and classes:
        raise unknown(f"algorithm of {module_name}", name, classes)
    raise UserError(f"{path!r} is no algorithm of stable-baselines3; its classes derive from BaseAlgorithm")


def keywords_of(algorithm: type[BaseAlgorithm]) -> list[str]:
    """What its constructor takes."""
    return list(inspect.signature(algorithm.__init__).parameters)


def settle(policy: BasePolicy, std: float) -> None:
    """Make the first actions N(0, std²): uniform pruning and its surroundings.

    Knows SB3's names of heads (``action_net`` on-policy, ``actor.mu`` off-policy); others stay as they are.
    """
    actors = [policy, getattr(policy, "actor", None), getattr(policy, "actor_target", None)]
    with torch.no_grad():
        for actor in filter(None, actors):
            for name in ("action_net", "mu"):
                layers = [
                    m for m in getattr(actor, name, nn.Identity()).modules() if isinstance(m, nn.Linear)
                ]
                for parameter in layers[-1].parameters() if layers else ():
                    parameter.zero_()
            spread = getattr(actor, "log_std", None)
            if isinstance(spread, nn.Linear):
                spread.weight.zero_()
                spread.bias.fill_(math.log(std))
            elif isinstance(spread, nn.Parameter):
                spread.fill_(math.log(std))
