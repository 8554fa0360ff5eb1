"""The scorer: how far a pruned pair is from the dense pair, on images that nothing was trained on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gan.balance import balance_gap
from gan.checkpoints import tensors_hash
from gan.cost import CostKind, CostModel
from gan.data import PairedImages
from gan.density import PATCH_EPSILON, Neighbourhoods
from gan.elastic import ElasticNetwork
from gan.evaluations import PrunableNetwork, Scores
from gan.features import Extractor, Look
from gan.fidelity import KernelReference
from gan.gates import GatedNetwork, GatedPair
from gan.losses import condition_of, paired_input
from gan.norm_statistics import recompute_statistics
from gan.plans import Plan
from gan.runtime import frozen_copy, quick_layout
from gan.surrogate import Surrogate, cautious

FORMULAS = "4"
"""Raised whenever a gap's formula changes: scores of different formulas must not meet in one log."""


@torch.no_grad()
def run_batched(network: nn.Module, inputs: Tensor, batch_size: int = 32) -> Tensor:
    """Outputs of a network for many inputs, without gradients; (N, …) → (N, …)."""
    return torch.cat([network(chunk) for chunk in inputs.split(batch_size)])


class Yardstick:
    """The dense pair's behaviour on a fixed set of images, and the distance of others from it.

    Args:
        generator: dense, in evaluation mode.
        discriminator: dense, in evaluation mode; it sees input and image stacked, or the image alone.
        pairs: the images. Where the task has no pairs, each input and the image that was drawn for it: no
            output is held against its own target, only margins and the distribution of all.
        extractor: image → feature vector.
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, pairs: PairedImages, extractor: Extractor
    ) -> None:
        device = next(generator.parameters()).device
        self.pairs, self.extractor = pairs, extractor
        self.inputs, self.targets = (images.to(device) for images in pairs.tensors())
        # laid out as the slices are, so that the whole pair's gaps are exactly 0
        generator, self.discriminator = (frozen_copy(one, amp=False) for one in (generator, discriminator))
        self.outputs = run_batched(generator, self.inputs)
        self.features, patches = extractor.look(self.outputs)
        self.real_features = extractor(self.targets)
        self.neighbourhoods = Neighbourhoods.build(self.features)
        self.patch_neighbourhoods = Neighbourhoods.build(patches, epsilon=PATCH_EPSILON)
        self.to_dense = KernelReference(self.features)
        self.to_real = KernelReference(self.real_features)
        self.dense_to_real = self.to_real.mmd2(self.features)
        self.feature_spread = float((self.features - self.features.mean(0)).norm(dim=1).mean())
        self._condition = condition_of(self.discriminator, self.inputs, self.targets.shape[1])
        self._real = paired_input(self._condition, self.targets)
        self.real_logits = run_batched(self.discriminator, self._real)
        self.fake_logits = self.judge(self.outputs)

    def generator_gaps(
        self, outputs: Tensor, look: Look | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Every gap that the generator alone decides, and diagnostics.

        The crowds are those of patches: a pruned output lies so far from its dense twin that no neighbourhood
        of whole images is left, and their crowds say again what the distance of distributions says. The
        arrangement is that of whole images. See docs/calibration.md.

        Args:
            outputs: (N, 3, H, W) of the pruned generator for the yardstick's inputs.
            look: what the extractor sees in them, when it has looked already.
        """
        features, patches = self.extractor.look(outputs) if look is None else look
        density = self.neighbourhoods.compare(features)
        gaps = {
            "crowd_gap": self.patch_neighbourhoods.compare(patches).crowd,
            "arrangement_gap": density.arrangement,
            "mmd_gap": max(0.0, self.to_dense.mmd2(features)),
            "real_gap": max(0.0, self.to_real.mmd2(features) - self.dense_to_real),
            "l1_gap": float((outputs - self.outputs).abs().mean()),
            "feature_gap": float((features - self.features).norm(dim=1).mean()) / self.feature_spread,
        }
        return gaps, {"arrangement_mean": density.stretch}

    def judge(self, outputs: Tensor) -> Tensor:
        """Logits of the dense discriminator on a generator's outputs."""
        return run_batched(self.discriminator, paired_input(self._condition, outputs))

    def logits_on_real(self, discriminator: nn.Module) -> Tensor:
        """Logits of a pruned discriminator on the real images."""
        return run_batched(discriminator, self._real)

    def balance_gap(
        self,
        outputs: Tensor,
        discriminator: nn.Module,
        on_real: Tensor | None = None,
        judged: Tensor | None = None,
    ) -> float:
        """How far the pruned pair's balance is from the dense pair's.

        Args:
            outputs: of the pruned generator.
            discriminator: the pruned one.
            on_real: its :meth:`logits_on_real`, when they are known already.
            judged: what :meth:`judge` says of the outputs, when it is known already.
        """
        on_real = self.logits_on_real(discriminator) if on_real is None else on_real
        judged = self.judge(outputs) if judged is None else judged
        fake = run_batched(discriminator, paired_input(self._condition, outputs))
        return balance_gap(self.real_logits, self.fake_logits, judged, on_real, fake)


@dataclass(frozen=True)
class PairAgent:
    """One network as the scorer holds it.

    Attributes:
        elastic: the weights that slices come from.
        cost: closed-form cost.
        statistics_inputs: (M, C, H, W) on which the BatchNorm statistics of every slice are recomputed.
    """

    elastic: ElasticNetwork
    cost: CostModel
    statistics_inputs: Tensor


class Generated(NamedTuple):
    """What a scorer remembers of a generator's slice.

    Attributes:
        outputs: (N, 3, H, W) for the probe.
        judged: the dense discriminator's logits on them.
        gaps, diagnostics: what the yardstick says of them.
    """

    outputs: Tensor
    judged: Tensor
    gaps: dict[str, float]
    diagnostics: dict[str, float]


class Scorer:
    """Plan → gaps, on the whole probe.

    Generator outputs are cached by generator widths and discriminators by theirs, so a move of one
    network alone costs only the other's passes.

    Args:
        generator, discriminator: the two networks.
        yardstick: the dense pair on the probe.
        multiples: agent → widths are multiples of it.
        cost_kind: what budgets speak of.
        ranking: name of the channel ranking.
        cache: how many slices of each network are remembered.
        amp: run the slices in bfloat16 (1.9 times as fast where the processor knows it); gaps stay float64.
        surrogate: predicts what finetuning makes of a plan; without one ``recovery_gap`` is 0 for every plan.
    """

    def __init__(
        self,
        generator: PairAgent,
        discriminator: PairAgent,
        yardstick: Yardstick,
        *,
        multiples: Mapping[str, int],
        cost_kind: CostKind = "macs",
        ranking: str = "l1",
        cache: int = 8,
        amp: bool = False,
        surrogate: Surrogate | None = None,
    ) -> None:
        self._amp, self._surrogate = amp, surrogate
        self._agents = {"generator": generator, "discriminator": discriminator}
        self.yardstick = yardstick
        self._ranking = ranking
        self._networks = {
            kind: PrunableNetwork(
                kind=kind,
                groups=agent.elastic.slicer.groups,
                multiple=multiples[kind],
                cost=agent.cost,
                cost_kind=cost_kind,
                importance=tuple(row.cpu().double().numpy() for row in agent.elastic.importance),
            )
            for kind, agent in self._agents.items()
        }
        self._cache_size = cache
        self._made: OrderedDict[tuple[int, ...], Generated] = OrderedDict()
        self._critics: OrderedDict[tuple[int, ...], tuple[nn.Module, Tensor]] = OrderedDict()
        self._fingerprint = {
            "weights": tensors_hash(
                {
                    f"{k}.{name}": t
                    for k, agent in self._agents.items()
                    for name, t in agent.elastic.tensors.items()
                }
            ),
            "probe": tensors_hash(
                {
                    "inputs": yardstick.inputs,
                    "targets": yardstick.targets,
                    "dense": yardstick.outputs,
                    "real_logits": yardstick.real_logits,
                    "fake_logits": yardstick.fake_logits,
                }
            ),
            "statistics": tensors_hash({k: agent.statistics_inputs for k, agent in self._agents.items()}),
            "extractor": f"{yardstick.extractor.name} {yardstick.extractor.fingerprint}",
            "formulas": FORMULAS,
            "precision": "bfloat16" if amp else "float32",
            "surrogate": "none" if surrogate is None else surrogate.fingerprint,
        }

    @property
    def networks(self) -> Mapping[str, PrunableNetwork]:
        return self._networks

    @property
    def ranking(self) -> str:
        return self._ranking

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return self._fingerprint

    def elastic(self, agent: str) -> ElasticNetwork:
        """The weights that slices of one network come from."""
        return self._agents[agent].elastic

    def gated(self) -> GatedPair:
        """The networks with gates on their channels, for a search by gradients; see :mod:`gan.gates`."""
        generator, discriminator = (GatedNetwork(held.elastic) for held in self._agents.values())
        yardstick = self.yardstick
        return GatedPair(
            generator,
            discriminator,
            inputs=yardstick.inputs,
            condition=condition_of(yardstick.discriminator, yardstick.inputs, yardstick.outputs.shape[1]),
            outputs=yardstick.outputs,
            neighbours=yardstick.neighbourhoods.neighbours,
        )

    def slice(self, agent: str, widths: Sequence[int], shared: bool = False) -> nn.Module:
        """A slice with its own BatchNorm statistics: what is scored, and what finetuning starts from."""
        held = self._agents[agent]
        network = held.elastic.network(widths, shared)
        if not shared:
            return recompute_statistics(network, held.statistics_inputs)
        quick_layout(network, self._amp)
        with self._precision():
            return recompute_statistics(network, held.statistics_inputs)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.yardstick.inputs.device.type, torch.bfloat16, enabled=self._amp)

    def _generated(self, widths: tuple[int, ...]) -> Generated:
        if widths not in self._made:
            network = self.slice("generator", widths, shared=True)
            with self._precision():
                outputs = run_batched(network, self.yardstick.inputs).float()
                judged = self.yardstick.judge(outputs).float()
            self._made[widths] = Generated(outputs, judged, *self.yardstick.generator_gaps(outputs))
            if len(self._made) > self._cache_size:
                self._made.popitem(last=False)
        return self._made[widths]

    def _critic(self, widths: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
        if widths not in self._critics:
            critic = self.slice("discriminator", widths, shared=True)
            with self._precision():
                self._critics[widths] = critic, self.yardstick.logits_on_real(critic).float()
            if len(self._critics) > self._cache_size:
                self._critics.popitem(last=False)
        return self._critics[widths]

    def score(self, plan: Plan) -> Scores:
        """All gaps of a plan; deterministic for a given version, device and thread count."""
        if plan.ranking != self._ranking:
            raise ValueError(
                f"the plan ranks channels by {plan.ranking!r}; these weights by {self._ranking!r}"
            )
        made = self._generated(plan["generator"])
        critic, logits = self._critic(plan["discriminator"])
        with self._precision():
            balance = self.yardstick.balance_gap(made.outputs, critic, logits, made.judged)
        gaps = {**made.gaps, "recovery_gap": 0.0, "balance_gap": balance}
        if self._surrogate is None:
            return Scores(gaps, made.diagnostics)
        mean, deviation = self._surrogate.predict(plan, gaps)
        gaps["recovery_gap"] = cautious(mean, deviation)
        told = {"recovery_mean": mean, "recovery_deviation": deviation}
        return Scores(gaps, {**made.diagnostics, **told})
