"""MAPPO on stock SB3 PPO: actors that see their own vector, a critic that sees the team's state beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from agents.base import (
    check_limited,
    read_description,
    read_options,
    rehearse,
    resolve_budgets,
    write_description,
)
from agents.elites import ElitePPO, WideBeginning, uniform_episode
from agents.learning import (
    ENDLESS,
    GAE_LAMBDA,
    LOCAL_NAMES,
    WEIGHTS,
    Progress,
    batch_size,
    check_interface,
    describe_interface,
    last_for_the_proposal,
    misfit,
    private_randomness,
)
from agents.tensorboard import EpisodeLog
from agents.vec_env import TeamVecEnv, action_space, policy_space, stack
from envs.observations import LOCAL_FIELDS, STATE_FIELDS, build_space
from envs.pruning_env import PruningEnv
from gan.checkpoints import load_tensors, save_tensors
from gan.errors import UserError, unknown
from gan.plans import Plan

Critic = Literal["shared", "own"]

KIND = LOCAL_NAMES.index("is_discriminator")
POSITION = LOCAL_NAMES.index("position")

STD_FACTOR = 10.0
"""By at most this factor the standard deviation of one group's actions differs from the common one."""


@dataclass(frozen=True)
class MappoOptions:
    """Options of :class:`Mappo`, found on the toy problem and larger analytic ones.

    Attributes:
        critic: ``shared``: one for all, which sees the team's state and whose turn it is (MAPPO); ``own``:
            one per network kind, which sees only what its actor sees (IPPO), for comparison.
        episodes: episodes per rollout, ≥ 1. SB3's default of 2,048 steps would never update in a short run.
        learning_rate: of Adam.
        epochs: passes over a rollout.
        minibatches: parts that a rollout is split into.
        gae_lambda: 0 trusts the critic, 1 the returns (Schulman et al. 2016, eq. 16); None takes
            ``agents.learning.GAE_LAMBDA`` of the environment's reward.
        clip: largest change of a probability ratio in one update.
        entropy: weight of the entropy bonus.
        std: initial standard deviation of actions; 1 is a move by the factor ``envs.budget.LARGEST_MOVE``.
        state_std: whether the standard deviation is learned as a function of what the actor sees, like the
            mean; else it is one number for all groups. What matters for a plan's worth can then become
            certain while the rest still varies. It begins when ``explore`` ends: learned from few plans, it
            would make a policy certain of the first that was not poor.
        explore: share of the evaluations, in [0, 1], during which a new policy's actions vary more: a good
            region that is far from uniform pruning has to be met before it can be learned.
        wide: their standard deviation in the beginning.
        elites: best episodes that are imitated after every update, ≥ 0; pruning uniformly is the first
            that is known. See :mod:`agents.elites`.
        imitation: passes over them.
        hidden: width of the one hidden layer of every network.
        waves: sines and cosines of the group's position that the actor sees beside its vector, ≥ 0. A small
            network is smooth in the position, but neighbouring layers may want opposite moves.
    """

    critic: Critic = "shared"
    episodes: int = 4
    learning_rate: float = 3e-3
    epochs: int = 10
    minibatches: int = 4
    gae_lambda: float | None = None
    clip: float = 0.2
    entropy: float = 0.0
    std: float = 0.25
    state_std: bool = True
    explore: float = 0.15
    wide: float = 0.6
    elites: int = 8
    imitation: int = 4
    hidden: int = 64
    waves: int = 6

    def __post_init__(self) -> None:
        if self.critic not in get_args(Critic):
            raise unknown("critic", str(self.critic), get_args(Critic))
        for name in ("episodes", "epochs", "minibatches", "hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("learning_rate", "clip", "std", "wide"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0; got {getattr(self, name)}")
        for name in ("entropy", "waves", "elites", "imitation"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be at least 0; got {getattr(self, name)}")
        for name, share in (("gae_lambda", self.gae_lambda), ("explore", self.explore)):
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"{name} must be in [0, 1]; got {share}")


class Both(BaseFeaturesExtractor):
    """Hands ``Dict(local, state)`` on as it is: actor and critic pick their own part.

    SB3 would flatten both into one vector that actor and critic share; then the actors would see the state.
    """

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=1)  # a size that nothing reads

    def forward(self, observations: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """The observations."""
        return observations


class Trunk(nn.Module):
    """A hidden layer over one vector.

    Args:
        size: length of the vector.
        hidden: width of the layer.
        waves: frequencies of the position's sines and cosines to add; 0 for none.
    """

    def __init__(self, size: int, hidden: int, waves: int = 0) -> None:
        super().__init__()
        self.waves = waves
        self.layer = nn.Linear(size + 2 * waves, hidden)

    def forward(self, vector: Tensor) -> Tensor:
        """(batch, size) → (batch, hidden)."""
        if self.waves:
            frequencies = math.pi * torch.arange(1, self.waves + 1, dtype=vector.dtype)
            angles = vector[:, POSITION : POSITION + 1] * frequencies
            vector = torch.cat([vector, angles.sin(), angles.cos()], dim=1)
        return torch.tanh(self.layer(vector))


class TrunkPerKind(nn.Module):
    """One trunk for generators and one for discriminators, side by side.

    The output has room for both, and the kind that a vector is not of stays 0: so one linear head on top is a
    head per kind.
    """

    def __init__(self, size: int, hidden: int, waves: int = 0) -> None:
        super().__init__()
        self.generator = Trunk(size, hidden, waves)
        self.discriminator = Trunk(size, hidden, waves)

    def forward(self, local: Tensor) -> Tensor:
        """(batch, size) → (batch, 2 × hidden)."""
        is_discriminator = local[:, KIND : KIND + 1]
        parts = [self.generator(local) * (1 - is_discriminator), self.discriminator(local) * is_discriminator]
        return torch.cat(parts, dim=1)


class Trunks(nn.Module):
    """What SB3 calls ``mlp_extractor``: the actors' trunks on ``local``, the critic's on what it sees.

    The shared critic sees the state and what the actor sees: the agent-specific global state of Yu et al.
    2022, section 5.2. From the state alone it cannot tell which group is about to be cut, and what that
    costs; it then was no better than own critics (docs/results.md).
    """

    def __init__(self, local: int, state: int, critic: Critic, hidden: int, waves: int) -> None:
        super().__init__()
        self.actor = TrunkPerKind(local, hidden, waves)
        self.critic: nn.Module
        self.critic_sees: tuple[str, ...]
        if critic == "shared":
            # local first: the waves are those of its position
            self.critic, self.critic_sees = Trunk(local + state, hidden, waves), ("local", "state")
            self.latent_dim_vf = hidden
        else:
            self.critic, self.critic_sees = TrunkPerKind(local, hidden, waves), ("local",)
            self.latent_dim_vf = 2 * hidden
        self.latent_dim_pi = 2 * hidden

    def forward_actor(self, observations: Mapping[str, Tensor]) -> Tensor:
        """(batch, latent_dim_pi)."""
        return self.actor(observations["local"])

    def forward_critic(self, observations: Mapping[str, Tensor]) -> Tensor:
        """(batch, latent_dim_vf)."""
        return self.critic(torch.cat([observations[part] for part in self.critic_sees], dim=1))


class TeamPolicy(ActorCriticPolicy):
    """A policy over ``Dict(local, state)``: decentralised actors, a critic of its own eyes.

    The actions' mean is exactly 0 to begin with: uniform pruning. Their standard deviation is the same for
    all then; with ``state_std`` a second head on the actor's trunk learns what to multiply it by. Actions are
    clipped, not squashed: inside the box the Gaussian is what it says, 0 stays reachable exactly, and SB3
    squashes only under gSDE, whose noise would be the same for a whole rollout.

    Args:
        args: as of SB3's policies.
        critic: whose critic it is, and with that what it sees.
        hidden: width of the hidden layers.
        waves: position frequencies of the actors.
        state_std: whether the standard deviation depends on what an actor sees.
        options: as of SB3's policies.
    """

    std_net: nn.Linear | None

    def __init__(
        self, *args: Any, critic: Critic, hidden: int, waves: int, state_std: bool, **options: Any
    ) -> None:
        self._trunks = {"critic": critic, "hidden": hidden, "waves": waves}
        self._state_std = state_std
        # set here, not by the caller: a policy that is built alone would forget it and share its extractor
        super().__init__(
            *args, **{**options, "features_extractor_class": Both, "share_features_extractor": False}
        )
        nn.init.zeros_(self.action_net.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.action_net.bias)  # type: ignore[arg-type]

    def _build_mlp_extractor(self) -> None:
        local, state = (self.observation_space[key].shape[0] for key in ("local", "state"))  # type: ignore[index]
        self.mlp_extractor = Trunks(local, state, **self._trunks)  # type: ignore[assignment, arg-type]
        self.std_net = None
        if self._state_std:
            # SB3 gives its optimiser what exists after this method
            self.std_net = nn.Linear(self.mlp_extractor.latent_dim_pi, 1)
            nn.init.zeros_(self.std_net.weight)
            nn.init.zeros_(self.std_net.bias)

    def learn_state_std(self, learn: bool) -> None:
        """Whether the second head learns; while it never has, all standard deviations are the common one."""
        if self.std_net is not None:
            self.std_net.requires_grad_(learn)

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Distribution:
        log_std: Tensor = self.log_std
        if self.std_net is not None:
            bound = math.log(STD_FACTOR)
            log_std = log_std + self.std_net(latent_pi).clamp(-bound, bound)
        means = self.action_net(latent_pi)
        return self.action_dist.proba_distribution(means, log_std)  # type: ignore[call-arg]


class Mappo:
    """Multi-agent PPO (Yu et al. 2022, arXiv:2103.01955): cooperative actors and one centralised critic.

    Every agent is a slot of the vectorised environment, so SB3's ratios are per agent, while the reward is
    the team's. γ = 1: a return is the final plan's gain over uniform, whose unit is fit to learn from
    (typical difference of random plans).

    Args:
        seed: of weights, actions and budgets drawn.
        name: as in the registry.
        tensorboard: folder for event files; None writes none.
        options: fields of :class:`MappoOptions`.
    """

    def __init__(
        self, seed: int = 0, *, name: str = "mappo", tensorboard: Path | None = None, **options: Any
    ) -> None:
        self.name = name
        self.seed = seed
        self.tensorboard = tensorboard
        self.options: MappoOptions = read_options(MappoOptions, name, options)
        self.policy: TeamPolicy | None = None

    def learn(self, env: PruningEnv) -> None:
        check_limited(env, self.name)
        log = EpisodeLog(self.tensorboard)
        try:
            with last_for_the_proposal(env, self, log), private_randomness():
                options = self.options
                explore = options.explore if self.policy is None else 0.0  # one that is known goes on
                ppo = self._build_ppo(TeamVecEnv(env))
                ppo.set_logger(log.logger)
                if ppo.imitates:
                    ppo.episodes.append(uniform_episode(env, self.seed))
                self.policy = ppo.policy  # type: ignore[assignment]
                young = WideBeginning(env.scorer, explore, options.wide, options.std)
                # log_interval: SB3 would add its own rows, over steps instead of evaluations
                ppo.learn(ENDLESS, [Progress(env.scorer, log), young], log_interval=None)  # type: ignore[arg-type]
        finally:
            log.close()

    def propose(self, env: PruningEnv, budgets: Mapping[str, float] | None = None) -> Plan:
        """The last plan of an episode of the policy's means."""
        policy = self.policy or self._build_policy()
        stage = rehearse(env)
        observations, _ = stage.reset(options={"budgets": resolve_budgets(env, budgets)})
        policy.set_training_mode(False)
        while stage.agents:
            seen = stack(stage.possible_agents, observations, stage.state())
            actions, _ = policy.predict(seen, deterministic=True)  # type: ignore[arg-type]
            observations, *_ = stage.step(dict(zip(stage.possible_agents, actions, strict=True)))
        return stage.plan

    def save(self, folder: Path) -> None:
        policy = self.policy or self._build_policy()
        content = {
            "seed": self.seed,
            "options": asdict(self.options),
            **describe_interface(),
        }
        write_description(folder, self.name, content)
        save_tensors(folder / WEIGHTS, policy.state_dict())

    def load(self, folder: Path) -> None:
        content = read_description(folder, self.name)
        check_interface(folder, content)
        try:
            options = read_options(MappoOptions, self.name, content["options"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no readable options ({error}); train the agent again") from error
        tensors = load_tensors(folder / WEIGHTS)
        policy = self._build_policy(options)
        try:
            policy.load_state_dict(tensors)
        except RuntimeError as error:
            raise misfit(folder, error) from error
        self.options, self.policy = options, policy

    def _build_ppo(self, slots: TeamVecEnv) -> ElitePPO:
        options = self.options
        steps = slots.env.horizon * options.episodes
        known = None if self.policy is None else self.policy.state_dict()
        ppo = ElitePPO(
            TeamPolicy,
            slots,
            horizon=slots.env.horizon,
            elites=options.elites,
            imitation=options.imitation,
            learning_rate=options.learning_rate,
            n_steps=steps,
            batch_size=batch_size(steps * slots.num_envs, options.minibatches),
            n_epochs=options.epochs,
            gamma=1.0,
            gae_lambda=GAE_LAMBDA[slots.env.reward] if options.gae_lambda is None else options.gae_lambda,
            clip_range=options.clip,
            ent_coef=options.entropy,
            policy_kwargs=self._policy_options(options),
            seed=self.seed,
            device="cpu",
        )
        if known is not None:
            ppo.policy.load_state_dict(known)
        return ppo

    def _build_policy(self, options: MappoOptions | None = None) -> TeamPolicy:
        """An untrained policy, which no environment is needed for."""
        options = options or self.options
        schedule: Callable[[float], float] = lambda _: options.learning_rate  # noqa: E731 - SB3 wants a schedule
        with private_randomness():
            torch.manual_seed(self.seed)
            return TeamPolicy(
                policy_space(build_space(LOCAL_FIELDS), build_space(STATE_FIELDS)),
                action_space(),
                schedule,
                **self._policy_options(options),
            )

    @staticmethod
    def _policy_options(options: MappoOptions) -> dict[str, Any]:
        return {
            "critic": options.critic,
            "hidden": options.hidden,
            "waves": options.waves,
            "state_std": options.state_std,
            "log_std_init": math.log(options.std),
        }
