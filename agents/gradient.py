"""Two differentiable agents, after the paper that this project started from: the baseline by gradients.

Ganjdanesh, Gao, Alipanah and Huang, "Compressing Image-to-Image Translation GANs Using Local Density
Structures on Their Learned Manifold", AAAI 2024. Written from its idea; what differs is said where it does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agents.base import (
    check_limited,
    read_description,
    read_options,
    resolve_budgets,
    write_description,
)
from agents.tensorboard import EpisodeLog
from envs.budget import allowed_cost, uniform
from envs.pruning_env import PruningEnv, peer_of
from gan.checkpoints import load_tensors, save_tensors
from gan.errors import UserError
from gan.evaluations import PrunableNetwork
from gan.gates import Differentiable, Directed, GatedPair
from gan.losses import paired_input
from gan.plans import Plan
from gan.runtime import bfloat16_pays
from gan.two_way import agent_of

WEIGHTS = "agents.safetensors"
"""Both agents' tensors, in an agent's folder."""

INPUTS = 16
"""Length of a layer's fixed input."""

TINY = 1e-6
"""Keeps the logarithm finite where outputs are judged alike, and the quotient where all judgements are."""

PROFILE = 8
"""Points that a network's widths are resampled to when the peer is told of them."""


@dataclass(frozen=True)
class GradientOptions:
    """Options of :class:`Gradient`.

    Attributes:
        steps: gradient steps that count as one evaluation, ≥ 1: about equal time (see :class:`Gradient`).
        every: of so many evaluations' worth one scores the plan as it is, the rest are gradient steps; ≥ 1.
        centres: neighbourhoods in a batch, ≥ 1.
        neighbours: outputs of a neighbourhood beside its centre, ≥ 0; at most as many as the scorer knows.
        learning_rate: of Adam, for both agents.
        temperature: of the Gumbel-sigmoid, > 0.
        cost: weight of the log-ratio cost term.
        hidden: width of the GRU.
    """

    steps: int = 5
    every: int = 10
    centres: int = 4
    neighbours: int = 3
    learning_rate: float = 3e-3
    temperature: float = 0.4
    cost: float = 4.0
    hidden: int = 32

    def __post_init__(self) -> None:
        for name in ("steps", "every", "centres", "hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0 and finite")
        for name in ("neighbours", "cost"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")


class LayerAgent(nn.Module):
    """Fixed inputs, one for each group → GRU → one logit for each group.

    A logit is added to that of the uniform plan's keep ratio, and starts at 0: uniform pruning.

    Args:
        groups: of its network.
        hidden: width of the GRU.
        random: draws the inputs and the weights.
    """

    inputs: Tensor
    told: Tensor

    def __init__(self, groups: int, hidden: int, random: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("inputs", torch.randn(groups, INPUTS, generator=random))
        self.register_buffer("told", torch.zeros(PROFILE))
        self.gru = nn.GRU(INPUTS + PROFILE, hidden)
        self.head = nn.Linear(hidden, 1)
        with torch.no_grad():
            for parameter in self.gru.parameters():
                bound = hidden**-0.5  # torch's own, but from a generator that is handed in
                parameter.copy_((2 * torch.rand(parameter.shape, generator=random) - 1) * bound)
            for parameter in self.head.parameters():
                parameter.zero_()

    def forward(self) -> Tensor:
        """(groups,) logits, for what the agent was told last."""
        told = self.told.expand(len(self.inputs), PROFILE)
        outputs, _ = self.gru(torch.cat([self.inputs, told], dim=1))
        return self.head(outputs)[:, 0]


class Target(NamedTuple):
    """What an agent starts from in one episode.

    Attributes:
        logits: (n,) of the uniform plan's keep ratios.
        cost: the cost that the budget allows.
    """

    logits: Tensor
    cost: float


class Gradient:
    """Two agents that learn by gradients through the networks' gates; the networks' weights are frozen.

    A translator of four networks has two of each kind: each direction's two play by themselves.

    Every agent gives one logit for each channel group of its network. The Gumbel-sigmoid (Maddison, Mnih and
    Teh 2017, arXiv:1611.00712; Jang, Gu and Poole 2017, arXiv:1611.01144) of the distance of every channel
    from the width that the logit stands for opens or shuts its gate, straight through (Bengio, Léonard and
    Courville 2013, arXiv:1308.3432); a group's channels share the noise, so that what is open is always a
    prefix in the order of importance: a plan. Before each step, either agent is told how wide the peer's
    layers are now (not where the environment has ``feedback=False``). Then the two play on neighbourhoods of
    the dense outputs for the logarithm of :func:`matching_gap`: the pruned generator is to be judged as the
    dense one is, neighbourhood by neighbourhood, the pruned discriminator is to tell them apart. Its weights
    were trained to tell real images from the *dense* generator's outputs, so that how well a plan fools it
    says little of the plan: over 34 finetuned plans Kendall's tau against their KID* is -0.2 for the
    generator's usual loss, 0.5 for the gap (``docs/calibration.md``). Both pay for |log(cost / budget)|,
    below the budget too: the projection will fill it, so gates that sank below would learn about networks
    that are never scored (measured: without, all of them shut). The final plan is projected to the budget
    and scored like everyone's.

    **What it costs.** A step is no evaluation, but it is work: ``steps`` of them are counted as one
    (``CountedScorer.spend``), at equal time. On the embedded U-Net at 10 % of the parameters, on one thread,
    an evaluation (160 probe images through a slice, the extractor and the discriminators) takes about as
    long as five steps (16 images through the full-width pair and back; 2.2 s and 0.4 s without bfloat16). One
    in ``every`` evaluations scores the plan as it is, so that this search's best plan is the best of many,
    like everyone's. Steps are not in the evaluation log: a resumed run takes them again.

    Args:
        seed: of weights, noise, batches and budgets drawn.
        tensorboard: folder for event files; None writes none.
        options: fields of :class:`GradientOptions`.
    """

    def __init__(self, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> None:
        self.name = "gradient"
        self.seed = seed
        self.tensorboard = tensorboard
        self.options = read_options(GradientOptions, self.name, options)
        self.agents: dict[str, LayerAgent] | None = None

    def learn(self, env: PruningEnv) -> None:
        """Search until the evaluations are spent.

        Raises:
            UserError: if the environment has no limit, or its scorer no networks to reach into.
        """
        check_limited(env, self.name)
        pairs = find_pairs(env, self.name)
        random = torch.Generator().manual_seed(self.seed)
        agents = self._agents_for(env, random)
        games = []
        for generator, pair in pairs.items():
            players = {name: agents[name] for name in (generator, peer_of(generator))}
            networks, held, feedback = env.scorer.networks, env.held, env.feedback
            games.append(Game(pair, networks, players, self.options, random, held, feedback))
        log = EpisodeLog(self.tensorboard)
        env.reset(seed=self.seed)
        scorer = env.scorer
        assert scorer.limit is not None
        while not scorer.exhausted:
            targets = find_targets(env, env.episode_budgets)
            for _ in range(min(self.options.every, scorer.limit - scorer.evaluations) - 1):
                report: dict[str, float] = {}
                for _ in range(self.options.steps):
                    for game in games:
                        report |= game.step(targets)
                scorer.spend(1)
                for name, value in report.items():
                    log.logger.record(f"train/{name}", value)
            before = scorer.evaluations
            evaluation = env.evaluate(self._plan(env, env.episode_budgets))
            log.record(scorer.evaluations, evaluation.potential, evaluation.term_scores)
            scorer.spend(before + 1 - scorer.evaluations)  # a known plan is paid for, too: so it ends
            env.reset()  # draws the next budgets, where they are ranges
        log.close()

    def propose(self, env: PruningEnv, budgets: Mapping[str, float] | None = None) -> Plan:
        """The plan of the agents' logits without noise, projected to the budget; uniform before learning.

        Raises:
            UserError: if the agents are of other networks.
        """
        if self.agents is None:
            return env.uniform_plan(budgets)
        return self._plan(env, resolve_budgets(env, budgets))

    def save(self, folder: Path) -> None:
        groups = {name: len(agent.inputs) for name, agent in (self.agents or {}).items()}
        content = {"seed": self.seed, "options": asdict(self.options), "groups": groups}
        write_description(folder, self.name, content)
        if self.agents is not None:
            save_tensors(folder / WEIGHTS, nn.ModuleDict(self.agents).state_dict())

    def load(self, folder: Path) -> None:
        content = read_description(folder, self.name)
        try:
            options = read_options(GradientOptions, self.name, content["options"])
            groups = {str(name): int(number) for name, number in content["groups"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder} holds no readable agents ({error}); train them again") from error
        agents = None
        if groups:
            agents = build_agents(groups, options.hidden, torch.Generator().manual_seed(0))
            try:
                nn.ModuleDict(agents).load_state_dict(load_tensors(folder / WEIGHTS))
            except RuntimeError as error:
                detail = str(error).splitlines()[-1].strip()
                raise UserError(f"the agents in {folder} do not fit their options: {detail}") from error
        self.options, self.agents = options, agents

    def _agents_for(self, env: PruningEnv, random: torch.Generator) -> dict[str, LayerAgent]:
        groups = {agent: len(network.groups) for agent, network in env.scorer.networks.items()}
        if self.agents is None:
            self.agents = build_agents(groups, self.options.hidden, random)
        mine = {name: len(agent.inputs) for name, agent in self.agents.items()}
        if mine != groups:
            raise UserError(
                f"these gradient agents are for networks of {mine} groups; the environment has {groups}"
            )
        return self.agents

    @torch.no_grad()
    def _plan(self, env: PruningEnv, budgets: Mapping[str, float]) -> Plan:
        agents = self._agents_for(env, torch.Generator().manual_seed(self.seed))
        targets = find_targets(env, budgets)
        proportions = {
            name: torch.sigmoid(targets[name].logits + agent()).double().numpy()
            for name, agent in agents.items()
        }
        return env.plan_from_proportions(proportions, budgets)


class Game:
    """The two agents, the networks whose gates they set, and what each wants.

    Args:
        pair: the networks with gates, and the neighbourhoods.
        networks: agent → what its widths cost.
        agents: agent → its logits.
        options: of the search.
        random: draws batches and noise.
        held: agents whose networks stay uniform.
        feedback: whether each is told of the peer's widths before a step.
    """

    def __init__(
        self,
        pair: GatedPair,
        networks: Mapping[str, PrunableNetwork],
        agents: Mapping[str, LayerAgent],
        options: GradientOptions,
        random: torch.Generator,
        held: Collection[str] = (),
        feedback: bool = True,
    ) -> None:
        self.pair, self.networks, self.agents = pair, networks, agents
        self.options, self.random, self.held, self.feedback = options, random, held, feedback
        self.optimizers = {
            name: torch.optim.Adam(agent.parameters(), lr=options.learning_rate)
            for name, agent in agents.items()
        }

    def step(self, targets: Mapping[str, Target]) -> dict[str, float]:
        """One step of each agent on the same neighbourhoods; returns what they play for, and their costs."""
        pair, (generator, discriminator) = self.pair, self.agents
        if self.feedback:
            self._exchange()
        gates, costs = {}, {}
        for name in self.agents:
            gates[name], costs[name] = self._draw(name, targets[name])
        rows = self._neighbourhoods()
        inputs, told, dense = pair.inputs[rows], pair.condition[rows], pair.outputs[rows]
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bfloat16_pays(inputs.device)):
            made = pair.generator(inputs, gates[generator])
            # what the generator descends, the discriminator climbs
            turned = [2 * gate.detach() - gate for gate in gates[discriminator]]
            # each normalised by its own batch, as in training: in one batch the gap is mostly a shift of all
            # outputs, which finetuning repairs first
            of_dense, of_made = (
                pair.discriminator(paired_input(told, images), turned).float() for images in (dense, made)
            )
        gap = (matching_gap(of_dense, of_made, self.options.centres) + TINY).log()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        total = gap + self.options.cost * sum(costs.values())
        if total.requires_grad:  # nothing of a held network has a gradient
            total.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        report = {f"{name}_log_cost": float(cost.detach()) for name, cost in costs.items()}
        return report | {f"{generator}_log_gap": float(gap.detach())}

    def _neighbourhoods(self) -> Tensor:
        """(B,) rows of the probe: some centres, each with its nearest neighbours."""
        neighbours = self.pair.neighbours
        centres = torch.randint(len(neighbours), (self.options.centres,), generator=self.random)
        near = neighbours[centres.to(neighbours.device), : self.options.neighbours]
        return torch.cat([centres.to(neighbours.device)[:, None], near], dim=1).flatten()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Tell each agent how far the peer's keep ratios are from uniform, in logits, first layer to last."""
        (first, second), said = self.agents, {name: agent() for name, agent in self.agents.items()}
        for name, peer in ((first, second), (second, first)):
            profile = nn.functional.interpolate(said[peer][None, None], size=PROFILE, mode="linear")
            self.agents[name].told.copy_(profile[0, 0])

    def _draw(self, name: str, target: Target) -> tuple[list[Tensor], Tensor]:
        """Gates of one network, each (channels,) of ones and zeros, and its cost term."""
        network, options = self.networks[name], self.options
        logits = target.logits + self.agents[name]()
        draws = torch.rand(len(logits), generator=self.random).clamp(1e-6, 1 - 1e-6)
        noisy = logits + options.temperature * torch.logit(draws)
        if name in self.held:
            noisy = target.logits
        gates, widths = [], []
        for logit, group in zip(noisy, network.groups, strict=True):
            gate = prefix_gate(logit, group.channels, network.multiple, options.temperature)
            gates.append(gate)
            widths.append(gate.sum())
        return gates, log_ratio(network, torch.stack(widths), target.cost)


def matching_gap(dense: Tensor, made: Tensor, centres: int) -> Tensor:
    """How differently a critic judges dense and pruned outputs, neighbourhood by neighbourhood.

    The squared difference of the mean logits, mean over neighbourhoods and patches, over the variance of the
    logits of dense outputs: a critic that answers louder does not tell them apart any better.

    Args:
        dense, made: (centres · n, 1, H, W) logits, one neighbourhood after the other.
        centres: neighbourhoods.

    Returns:
        0-d, ≥ 0; 0 for equal means.
    """
    means, others = (judged.unflatten(0, (centres, -1)).mean(1) for judged in (dense, made))
    return (means - others).square().mean() / (dense.var(correction=0) + TINY)


def prefix_gate(logit: Tensor, channels: int, multiple: int, temperature: float) -> Tensor:
    """Straight-through gates that keep about ``sigmoid(logit)`` of a group's channels, the first ones.

    Channel c's own logit is that of its place, logit((c + ½) / channels), c the middle of its multiple; its
    gate is sigmoid((logit - that) / temperature), rounded on the way forward. The first multiple stays open.

    Args:
        logit: 0-d.
        channels: in the group.
        multiple: channels that are kept or cut together.
        temperature: > 0; small ones let only the channels at the edge have a gradient.

    Returns:
        (channels,) ones, then zeros.
    """
    steps = -(-channels // multiple)
    middles = ((torch.arange(steps) + 0.5) * multiple / channels).clamp(max=1 - 0.5 / channels)
    soft = torch.sigmoid((logit - torch.logit(middles)) / temperature)
    hard = (soft > 0.5).to(soft)
    hard[0] = 1.0
    gate = hard + soft - soft.detach()
    return gate.repeat_interleave(multiple)[:channels]


def log_ratio(network: PrunableNetwork, widths: Tensor, allowed: float) -> Tensor:
    """abs(log(cost / allowed)), with a gradient to the widths.

    The gradient of the cost is taken by central differences of one channel: any kind of cost has one then,
    measured latency too, and for products of two widths it is exact.

    Args:
        network: knows what widths cost.
        widths: (n,) kept channels.
        allowed: the cost that the budget allows.
    """
    at = widths.detach().double().cpu().numpy()
    steps = np.concatenate([at[None], at + 0.5 * np.eye(len(at)), at - 0.5 * np.eye(len(at))])
    costs = network.cost_of(steps)  # type: ignore[arg-type]
    slopes: NDArray[np.float64] = costs[1 : len(at) + 1] - costs[len(at) + 1 :]
    value, slope = float(costs[0]), torch.from_numpy(slopes).to(widths)
    return (math.log(value / allowed) + ((widths - widths.detach()) * slope).sum() / value).abs()


def find_pairs(env: PruningEnv, name: str) -> dict[str, GatedPair]:
    """The agent of each generator → its pair behind the environment's scorer.

    Raises:
        UserError: if there are none.
    """
    scorer = env.scorer.scorer
    ways = scorer.ways if isinstance(scorer, Directed) else {"": scorer}
    pairs = {}
    for way, one in ways.items():
        if not isinstance(one, Differentiable):
            raise UserError(
                f"{name!r} sends gradients through the networks, and {type(one).__name__} has none: take a "
                "task with networks, or another learner"
            )
        pairs[agent_of("generator", way)] = one.gated()
    return pairs


def find_targets(env: PruningEnv, budgets: Mapping[str, float]) -> dict[str, Target]:
    """Agent → where its logits start, and the cost that its budget allows."""
    targets = {}
    for agent, network in env.scorer.networks.items():
        # a group that uniform keeps whole has no finite logit
        ratios = torch.from_numpy(uniform(network, budgets[agent]).proportions).float().clamp(max=0.99)
        targets[agent] = Target(torch.logit(ratios), allowed_cost(network, budgets[agent]))
    return targets


def build_agents(groups: Mapping[str, int], hidden: int, random: torch.Generator) -> dict[str, LayerAgent]:
    """One agent for each network."""
    with torch.random.fork_rng(devices=[]):  # torch's layers draw weights of their own first
        return {name: LayerAgent(number, hidden, random) for name, number in groups.items()}
