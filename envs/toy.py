"""An analytic problem with a known best plan: ablations and learning tests in seconds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from envs.budget import DEFAULT_BUDGETS, Budget, default_budgets, project
from envs.pruning_env import PruningEnv, Reward
from envs.records import Evaluation, Listener
from envs.rewards import Weights
from gan.cost import CostModel
from gan.evaluations import CountedScorer, EvaluationLog, PrunableNetwork, Scores
from gan.groups import ChannelGroup, Slot
from gan.plans import Plan

TOY_WEIGHTS = Weights(density=0.0, fidelity=1.0, balance=1.0)
"""Both networks count alike, so that both agents have something to learn."""

GENERATOR_CHANNELS = (32, 64, 128, 128, 64, 32)
GENERATOR_SHAPE = (0.5, 1.9, 0.8, 0.45, 1.7, 1.0)
"""Best proportions of the groups, up to a common factor; each within one decision's reach of uniform."""

DISCRIMINATOR_CHANNELS = (32, 64, 128)
DISCRIMINATOR_SHAPE = (2.0, 0.6, 1.0)

COUPLING = 0.5
"""How far the discriminator's best proportions follow the generator's tilt (0 = not at all)."""


def toy_network(
    kind: str,
    channels: Sequence[int],
    *,
    multiple: int = 4,
    image: int = 64,
    skips: bool = False,
    fixed_in: int = 3,
    fixed_out: int = 3,
    importance_decay: float = 1.0,
) -> PrunableNetwork:
    """A chain of 4×4 convolutions as a search sees it; there are no weights.

    The first half of a generator halves the resolution at each group and the second half doubles it again; a
    discriminator only halves it.

    Args:
        kind: ``generator`` or ``discriminator``.
        channels: dense width of each group.
        multiple: widths are multiples of it.
        image: height and width of the input, in pixels.
        skips: concatenate the output of the i-th group to that of its mirror image, as in a U-Net.
        fixed_in: channels of the input.
        fixed_out: channels of the output.
        importance_decay: importance of channel i of C is exp(-decay × i / C).
    """
    n, kernel = len(channels), 4
    generator = kind == "generator"
    down = (n + 1) // 2 if generator else n
    heights = [image >> min(i + 1, down) << max(0, i + 1 - down) for i in range(n)]
    groups = tuple(
        ChannelGroup(
            name=f"layer_{i}",
            channels=width,
            slots=(Slot(f"layer_{i}", "out", 0), Slot(f"layer_{i + 1}", "in", 0)),
            kind="conv" if i < down else "transposed",
            kernel=kernel,
            stride=2,
            resolution=max(1, height),
        )
        for i, (width, height) in enumerate(zip(channels, heights, strict=True))
    )
    in_groups, out_groups = np.eye(n + 1, n, k=-1), np.eye(n + 1, n)
    if skips:
        for i in range(n // 2):
            in_groups[n - i, i] += 1
    in_fixed, out_fixed = np.zeros(n + 1), np.zeros(n + 1)
    in_fixed[0], out_fixed[-1] = fixed_in, fixed_out
    # a transposed convolution computes at its input's pixels
    positions = np.array(
        [heights[min(i, n - 1) if i < down else i - 1] ** 2 for i in range(n + 1)], dtype=np.float64
    )
    area = np.full(n + 1, float(kernel**2))
    cost = CostModel(
        kernel_macs=positions * area,
        kernel_params=area,
        in_groups=in_groups,
        in_fixed=in_fixed,
        out_groups=out_groups,
        out_fixed=out_fixed,
        vector_params=np.ones(n),
        vector_fixed=float(fixed_out),
        dense=np.array(channels, dtype=np.int64),
    )
    importance = tuple(np.exp(-importance_decay * np.arange(width) / width) for width in channels)
    return PrunableNetwork(kind, groups, multiple, cost, "macs", importance)


class ToyScorer:
    """Gaps that grow with the distance, in the log, of the widths from the best ones.

    With d = log(width / best width) per group, minus its mean (so that only the shape counts, at any budget):

    - ``mmd_gap`` is the generator's mean d²;
    - ``l1_gap`` its mean |d|;
    - ``balance_gap`` the discriminator's mean (d - t)², where t tilts its best shape towards later groups by
      ``coupling`` × (mean d of the generator's second half - mean d of its first half): the best
      discriminator depends on the generator, and at the best generator t = 0.

    So all gaps are 0 at ``optimum``, and only there among plans of its cost. (The gaps of a real scorer are 0
    for the dense pair; nothing here knows of it.)

    Args:
        networks: ``generator`` and ``discriminator``.
        shapes: agent → (n,) best proportions, up to a common factor.
        budgets: agent → keep ratio at which the best proportions are turned into widths.
        coupling: see above, in [0, 1].

    Attributes:
        networks: agent → network.
        ranking: name of the channel ranking.
        fingerprint: what the scores depend on.
        optimum: the best plan at ``budgets``.
    """

    def __init__(
        self,
        networks: Mapping[str, PrunableNetwork],
        shapes: Mapping[str, Sequence[float]],
        budgets: Mapping[str, float],
        coupling: float = COUPLING,
    ) -> None:
        self.networks = networks
        self.coupling = coupling
        self.ranking = "toy"
        self.optimum = Plan.of(
            {
                agent: project(network, np.array(shapes[agent]), budgets[agent]).widths.tolist()
                for agent, network in networks.items()
            },
            self.ranking,
        )
        self.fingerprint = {"scorer": "toy-1", "optimum": self.optimum.key, "coupling": str(coupling)}

    def _distance(self, plan: Plan, agent: str) -> NDArray[np.float64]:
        d = np.log(np.array(plan[agent]) / np.array(self.optimum[agent]))
        return d - d.mean()

    def score(self, plan: Plan) -> Scores:
        """The gaps of a plan."""
        g, d = self._distance(plan, "generator"), self._distance(plan, "discriminator")
        half = len(g) // 2
        tilt = self.coupling * (g[half:].mean() - g[:half].mean())
        d = d - tilt * np.linspace(-0.5, 0.5, len(d))
        return Scores(
            gaps={
                "mmd_gap": float(np.mean(g**2)),
                "l1_gap": float(np.mean(np.abs(g))),
                "balance_gap": float(np.mean(d**2)),
            }
        )


def toy_scorer(
    budgets: Mapping[str, float] | None = None, *, multiple: int = 4, coupling: float = COUPLING
) -> ToyScorer:
    """A six-group generator with skips and a three-group discriminator.

    Args:
        budgets: agent → keep ratio of the cost at which the best plan is known; the defaults if None.
        multiple: widths are multiples of it.
        coupling: how far the best discriminator depends on the generator.
    """
    return ToyScorer(
        {
            "generator": toy_network("generator", GENERATOR_CHANNELS, multiple=multiple, skips=True),
            "discriminator": toy_network(
                "discriminator", DISCRIMINATOR_CHANNELS, multiple=multiple, fixed_in=6, fixed_out=1
            ),
        },
        {"generator": GENERATOR_SHAPE, "discriminator": DISCRIMINATOR_SHAPE},
        budgets or DEFAULT_BUDGETS,
        coupling,
    )


def toy_env(
    evaluations: int | None = None,
    reward: Reward = "step",
    *,
    budgets: Mapping[str, Budget | float | str] | None = None,
    weights: Weights = TOY_WEIGHTS,
    feedback: bool = True,
    held: Collection[str] = (),
    log: EvaluationLog | None = None,
    listener: Listener | None = None,
    multiple: int = 4,
    coupling: float = COUPLING,
) -> PruningEnv:
    """A ready environment on the toy problem.

    Args:
        evaluations: evaluations after which the scorer says that it is exhausted; None = never.
        reward: ``step`` or ``final``.
        budgets: agent → budget; the defaults where not given. The best plan is known at the log-middle of
            ranges.
        weights: weights of the reward families.
        feedback: False hides from every agent what its peer and the last joint step did.
        held: agents whose networks stay uniform.
        log: keeps the scores.
        listener: is told of plans and episodes.
        multiple: widths are multiples of it.
        coupling: how far the best discriminator depends on the generator.
    """
    ranges = default_budgets(DEFAULT_BUDGETS, budgets)
    scorer = toy_scorer(
        {agent: b.at(0.5) for agent, b in ranges.items()}, multiple=multiple, coupling=coupling
    )
    return PruningEnv(
        CountedScorer(scorer, log, evaluations),
        ranges,
        weights=weights,
        reward=reward,
        feedback=feedback,
        held=held,
        listener=listener,
    )


def toy_optimum(env: PruningEnv) -> Evaluation:
    """The best plan of a toy environment and its score; not counted.

    Raises:
        TypeError: if the environment is no toy.
    """
    scorer = env.scorer.scorer
    if not isinstance(scorer, ToyScorer):
        raise TypeError(f"only a ToyScorer knows its best plan; got {type(scorer).__name__}")
    budgets = {agent: budget.at(0.5) for agent, budget in env.budgets.items()}
    return env.evaluate(scorer.optimum, budgets, counted=False)
