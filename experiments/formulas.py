"""Which formula of the gaps predicts the finetuned result? Many, over the plans of a finished study."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from tyro.conf import Positional

from envs.rewards import SCORE_BOUNDS, Weights, robust_spread
from experiments import calibrate, cli
from experiments.agreement import (
    LEVEL,
    RESAMPLES,
    Interval,
    better_half,
    kendall,
    kendall_interval,
    regret,
    weighted_taus,
)
from experiments.calibrate import KID, Sizes, StudyFolder, named, read_study, reopen_study, settings_of
from experiments.candidates import NamedPlan
from experiments.report import markdown_table
from experiments.runs import plain
from experiments.trials import Trial, Workbench
from experiments.watch import Watch
from gan.append_log import AppendLog
from gan.balance import balance_gap, margins
from gan.data import PairedImages, to_float, to_uint8
from gan.density import EPSILON, PATCH_EPSILON, DensityGaps, Neighbourhoods
from gan.distillation import NO_INGREDIENTS, DensePair, Ingredients
from gan.elastic import ElasticOptions, teaching_images
from gan.errors import UserError
from gan.features import load_extractor, load_stages
from gan.fidelity import KernelReference, density_coverage, frechet_distance, image_l1, kid
from gan.files import write_json, write_text
from gan.loop import trainable_copy
from gan.losses import paired_input
from gan.plans import Plan
from gan.runtime import bfloat16_pays
from gan.scoring import Scorer, run_batched
from gan.tasks import load_task, named_elastic
from gan.training import Lessons, PairedTrainer, TrainingOptions

DESCRIPTION = """Computes many formulas of a plan's gaps for the plans of a finished calibration study and
tabulates how well each predicts the finetuned KID: alone, and beside MMD^2 in the total. Also a few
finetuning steps. Interrupt it whenever you like: the same command goes on."""
EXAMPLES = (
    ("python experiments/formulas.py STUDY", "everything: an hour on one core, most of it finetuning"),
    ("python experiments/formulas.py STUDY --parts instant", "without finetuning: some minutes"),
    ("python experiments/formulas.py STUDY --parts", "no new work: the tables of what is there"),
)
BLOCKS = (2, 4, 10)
"""Blocks of the extractor whose maps are looked at, beside its last map."""
PLACES = 9
"""Patches of an image that stand for all, at places drawn once."""
MARKS = (8, 24, 67, 134, 201)
"""Steps of the real finetuning after which a plan is measured; an epoch of the embedded task has 67."""
SHORT = (24, 67)
"""Lengths of finetunings of their own, whose learning rate falls to 0 in so many steps."""
SPLITS = 200
"""Random halves of the plans."""
BESIDE = (0.1, 1.0)
"""Weights that a density is tried with beside a fidelity of weight 1: the shipped one, and an equal one."""

Value = TypeVar("Value")
Part = Literal["instant", "rehearsals"]
Origin = Literal["made", "dense", "real"]


@dataclass(frozen=True)
class Options:
    """Options of ``formulas.py``."""

    study: Positional[Path]
    """Folder that calibrate.py has written; only its finished plans count."""
    output: Path | None = None
    """Folder, made or gone on with; without it STUDY/formulas."""
    parts: tuple[Part, ...] = ("instant", "rehearsals")
    """What to compute; rehearsals are the first steps of a finetuning."""
    steps: int = 201
    """Rehearsals end after so many steps, of 8, 24, 67, 134 and 201."""
    only: str = ""
    """Of the instant formulas only those whose name this regular expression finds; the rest another time."""


# What is seen of a plan


class Memo:
    """Values that are computed once, with the processor seconds that each has cost."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Any, dict[Hashable, float]]] = {}
        self._open: list[tuple[dict[Hashable, float], list[float]]] = []

    def __call__(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key; made when it is asked for first."""
        if key not in self._known:
            self._known[key] = self._timed(key, make)
        value, parts = self._known[key]
        if self._open:
            self._open[-1][0].update(parts)
        return value  # type: ignore[no-any-return]

    def cost(self, make: Callable[[], Value]) -> tuple[Value, float]:
        """A value that is not kept, and its seconds as if nothing had been known before."""
        value, parts = self._timed(None, make)
        return value, sum(parts.values())

    def _timed(self, key: Hashable, make: Callable[[], Value]) -> tuple[Value, dict[Hashable, float]]:
        parts: dict[Hashable, float] = {}
        inner = [0.0]
        self._open.append((parts, inner))
        started = time.process_time()
        try:
            value = make()
        finally:
            spent = time.process_time() - started
            self._open.pop()
        if self._open:
            self._open[-1][1][0] += spent
        return value, {**parts, key: spent - inner[0]}


class Probe(NamedTuple):
    """Images that outputs are made for: (N, 3, H, W) each, in [−1, 1]."""

    inputs: Tensor
    targets: Tensor


@dataclass(eq=False)
class View:
    """Images of one origin on one probe, and what can be seen in them.

    Attributes:
        bench: what they share.
        probe: its name.
        images: makes them, (N, 3, H, W).
        memo: where what is seen is kept.
        origin: what made them.
    """

    bench: Bench
    probe: str
    origin: Origin
    make: Callable[[], Tensor]
    memo: Memo

    def keep(self, what: Hashable, make: Callable[[], Value]) -> Value:
        """Compute something of this view once."""
        return self.memo((self.origin, self.probe, what), make)

    @property
    def images(self) -> Tensor:
        return self.keep("images", self.make)

    @property
    def dense(self) -> View:
        """The dense generator's outputs on the same probe."""
        return self if self.origin == "dense" else self.bench.dense(self.probe)

    def features(self, space: str) -> Tensor:
        """(n, d) float64 features in one of ``SPACES``."""
        return self.keep(("features", space), lambda: SPACES[space](self).double())

    def maps(self) -> list[Tensor]:
        """The extractor's maps after ``BLOCKS``, and the last one."""
        return self.keep("maps", lambda: load_stages(BLOCKS)(self.images))

    def critic(self) -> list[Tensor]:
        """What each layer of the dense discriminator answers, its logits last."""
        return self.keep("critic", self._critic)

    def _critic(self) -> list[Tensor]:
        network = self.bench.task.networks["discriminator"]
        rows: dict[int, list[Tensor]] = {}
        layers = [module for module in network.modules() if isinstance(module, nn.LeakyReLU)]
        hooks = [
            layer.register_forward_hook(lambda _, __, out, n=n: rows.setdefault(n, []).append(out))
            for n, layer in enumerate(layers)
        ]
        try:
            logits = run_batched(network, paired_input(self.bench.probes[self.probe].inputs, self.images))
        finally:
            for hook in hooks:
                hook.remove()
        return [*(torch.cat(rows[n]) for n in range(len(layers))), logits]


class Bench:
    """What all plans of a study share: networks, probes, and the dense outputs on them.

    Args:
        options: of the study.
    """

    def __init__(self, options: calibrate.Options) -> None:
        sizes = Sizes.of(options)
        self.task = load_task(options.task)
        weights = named_elastic(options.elastic, self.task)
        self.scorer: Scorer = self.task.scorer(
            options.cost, weights=weights, probe=sizes.images.probe, statistics_images=sizes.images.statistics
        )
        val = self.task.val.take(sizes.images.probe)
        train = self.task.train.take(len(val))
        drawn = teaching_images(self.task.train, ElasticOptions(), torch.Generator().manual_seed(0))
        batches = list(islice(drawn, math.ceil(len(val) / ElasticOptions.batch_size)))
        augmented = (torch.cat(rows)[: len(val)] for rows in zip(*batches, strict=True))
        self.probes = {
            "val": Probe(*val.tensors()),
            "mirrored": Probe(*val.with_flips().tensors()),
            "train": Probe(*train.tensors()),
            "augmented": Probe(*augmented),
        }
        self.memo = Memo()
        self._dense = {name: View(self, name, "dense", self._maker(name), self.memo) for name in self.probes}

    def _maker(self, probe: str) -> Callable[[], Tensor]:
        return lambda: run_batched(self.task.networks["generator"], self.probes[probe].inputs)

    def dense(self, probe: str) -> View:
        """The dense generator's outputs."""
        return self._dense[probe]

    def real(self, probe: str) -> View:
        """The targets."""
        targets = self.probes[probe].targets
        return View(self, probe, "real", lambda: targets, self.memo)

    @torch.no_grad()
    def run(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Outputs as the scorer makes them."""
        device = inputs.device
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_pays(device)):
            return run_batched(network, inputs).float()


class Case:
    """A plan on one probe, beside the dense pair; what formulas are functions of.

    Args:
        bench: what plans share.
        plan: its widths.
        probe: name of the probe.
        memo: of the plan, for all probes.
    """

    def __init__(self, bench: Bench, plan: Plan, probe: str, memo: Memo) -> None:
        self.bench, self.plan, self.probe, self.memo = bench, plan, probe, memo
        self.made = View(bench, probe, "made", self._outputs, memo)
        self.dense, self.real = bench.dense(probe), bench.real(probe)

    def network(self, agent: str) -> nn.Module:
        """The plan's slice, as the scorer cuts it."""
        widths = self.plan[agent]
        return self.memo(agent, lambda: self.bench.scorer.slice(agent, widths, shared=True))

    def _outputs(self) -> Tensor:
        return self.bench.run(self.network("generator"), self.bench.probes[self.probe].inputs)

    def judged(self, origin: Origin) -> Tensor:
        """Logits of the pruned discriminator on the pruned generator's outputs or the targets."""
        view: View = getattr(self, origin)
        seen = paired_input(self.bench.probes[self.probe].inputs, view.images)
        return self.memo(
            ("judged", origin, self.probe), lambda: self.bench.run(self.network("discriminator"), seen)
        )

    def keep(self, what: Hashable, make: Callable[[], Value], *origins: Origin) -> Value:
        """Compute something once: for all plans, where the plan has no part in it."""
        memo = self.memo if not origins or "made" in origins else self.bench.memo
        return memo((self.probe, what, origins), make)

    def neighbourhoods(self, space: str, k: int, epsilon: float = EPSILON) -> Neighbourhoods:
        """Those of the dense outputs."""
        make = lambda: Neighbourhoods.build(self.dense.features(space), k, epsilon)  # noqa: E731
        return self.keep(("neighbourhoods", space, k, epsilon), make, "dense")

    def density(self, space: str, k: int, epsilon: float = EPSILON) -> DensityGaps:
        """By the formula of ``gan.density``."""
        near = self.neighbourhoods(space, k, epsilon)
        return self.keep(("density", space, k, epsilon), lambda: near.compare(self.made.features(space)))

    def logs(self, a: Origin, b: Origin, space: str) -> Tensor:
        """(N, N) log distances, from the rows of one origin to those of another."""

        def make() -> Tensor:
            x, y = (getattr(self, origin).features(space) for origin in (a, b))
            distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
            return 0.5 * (distances.square() + self.neighbourhoods(space, 7).epsilon ** 2).log()

        return self.keep(("logs", space), make, a, b)

    def radius(self, a: Origin, b: Origin, space: str = "head", k: int = 7) -> Tensor:
        """(N,) mean log distance of each sample of ``a`` to the ``k`` nearest of ``b``, its own left out."""

        def make() -> Tensor:
            logs = self.logs(a, b, space).clone().fill_diagonal_(math.inf)
            return logs.topk(k, dim=1, largest=False).values.mean(dim=1)

        return self.keep(("radius", space, k), make, a, b)


# Spaces


Space = Callable[[View], Tensor]


def head(image_size: int) -> Space:
    """The extractor's own features."""
    return lambda view: load_extractor(image_size=image_size, threads=1)(view.images)


def pooled(place: int, spread: bool = False) -> Space:
    """A map's mean over the image, and its standard deviation where ``spread`` is asked for."""

    def space(view: View) -> Tensor:
        values = view.maps()[place]
        mean = values.mean((2, 3))
        return torch.cat([mean, values.flatten(2).std(2, correction=0)], 1) if spread else mean

    return space


def critic(layer: int) -> Space:
    """A layer of the dense discriminator, mean over the image."""
    return lambda view: view.critic()[layer].mean((2, 3))


def shipped_patches(view: View) -> Tensor:
    """The extractor's own patches, which the scorer's crowds are made of."""
    return load_extractor(threads=1).look(view.images).patches


def patches(maps: Callable[[View], Tensor]) -> Space:
    """Single places of a map, ``PLACES`` rows an image: neighbourhoods of patches instead of images."""

    def space(view: View) -> Tensor:
        rows = maps(view).flatten(2)
        places = torch.randperm(rows.shape[2], generator=torch.Generator().manual_seed(0))[:PLACES]
        return rows[:, :, places].transpose(1, 2).flatten(0, 1)

    return space


def pixels(side: int) -> Space:
    """Small copies of the images."""
    return lambda view: F.interpolate(view.images, size=side, mode="area").flatten(1)


def joined(*spaces: str) -> Space:
    """Several spaces side by side; the dense outputs have the same spread in each."""

    def space(view: View) -> Tensor:
        parts = []
        for one in spaces:
            dense = view.dense.features(one)
            parts.append(view.features(one) / (dense - dense.mean(0)).norm(dim=1).mean())
        row = torch.cat(parts, 1)
        return row * math.sqrt(row.shape[1] / len(parts))

    return space


def centred(space: str) -> Space:
    """Features less their own mean: what all images of an origin share is not seen."""
    return lambda view: view.features(space) - view.features(space).mean(0)


def whitened(space: str, parts: int = 32) -> Space:
    """Principal components of the dense outputs, each with a standard deviation of 1 among them."""

    def space_(view: View) -> Tensor:
        dense = view.dense.features(space)
        _, sizes, axes = torch.linalg.svd(dense - dense.mean(0), full_matrices=False)
        kept = min(parts, len(sizes))
        return (view.features(space) - dense.mean(0)) @ (axes[:kept].T / sizes[:kept]) * len(dense) ** 0.5

    return space_


SPACES: dict[str, Space] = {
    "head": head(112),
    "head 64 px": head(64),
    "head 160 px": head(160),
    **{f"block {block}": pooled(place) for place, block in enumerate(BLOCKS)},
    **{f"block {block} + std": pooled(place, spread=True) for place, block in enumerate(BLOCKS)},
    "head + std": pooled(-1, spread=True),
    **{f"critic {layer}": critic(layer - 1) for layer in (1, 2, 3, 4)},
    "patches": shipped_patches,
    "patches 2": patches(lambda view: view.maps()[0]),
    "patches 4": patches(lambda view: view.maps()[1]),
    "patches 10": patches(lambda view: view.maps()[2]),
    "patches critic": patches(lambda view: view.critic()[2]),
    "patches pixels": patches(lambda view: F.unfold(view.images, 8, stride=4)),
    "pixels": pixels(16),
    "head centred": centred("head"),
    "head whitened": whitened("head"),
    "all stages": joined(*(f"block {block}" for block in BLOCKS), "head"),
    "all stages + std": joined(*(f"block {block} + std" for block in BLOCKS), "head + std"),
    "critic": joined("critic 1", "critic 2", "critic 3", "critic 4"),
    "stages and critic": joined("all stages + std", "critic"),
}
"""Name → features of images. All at 112 pixels but where a size is given."""


# Formulas


Family = Literal["density", "distribution", "paired", "balance", "shape"]


@dataclass(frozen=True)
class Formula:
    """A number of a plan that might predict its finetuned result; lower is better.

    Attributes:
        family: what it is about.
        measure: computes it.
        probe: on these images.
    """

    family: Family
    measure: Callable[[Case], float]
    probe: str = "val"


def crowd(space: str = "head", k: int = 7, epsilon: float = EPSILON) -> Callable[[Case], float]:
    """Crowd sizes by the formula of ``gan.density``; the scorer's are those of ``patches``, ε = 0.3."""
    return lambda case: case.density(space, k, epsilon).crowd


def arrangement(space: str = "head", k: int = 7) -> Callable[[Case], float]:
    """The shipped arrangement gap."""
    return lambda case: case.density(space, k).arrangement


def change(
    first: tuple[Origin, Origin], second: tuple[Origin, Origin], fold: str, space: str = "head"
) -> Callable[[Case], float]:
    """Mean over samples of a difference of two log radii: ``signed``, ``absolute``, or one ``side`` of it."""
    folds: dict[str, Callable[[Tensor], Tensor]] = {
        "signed": lambda x: x,
        "absolute": torch.abs,
        "side": torch.relu,
    }

    def measure(case: Case) -> float:
        return float(folds[fold](case.radius(*first, space) - case.radius(*second, space)).mean())

    return measure


def stretch(case: Case, space: str, around: Origin = "dense", k: int = 7) -> Tensor:
    """(N, P) change of the log lengths inside the neighbourhoods of the dense outputs, or of the targets."""
    if around == "dense":
        members = case.neighbourhoods(space, k).neighbours
    else:
        members = case.logs(around, around, space).clone().fill_diagonal_(math.inf).sort(1).indices[:, :k]
    members = torch.cat([torch.arange(len(members))[:, None], members], 1)
    rows, columns = torch.triu_indices(k + 1, k + 1, offset=1)
    first, second = members[:, rows], members[:, columns]
    return (case.logs("made", "made", space) - case.logs(around, around, space))[first, second]


def shrunk(case: Case) -> float:
    """Only lengths that became shorter: blur and collapse."""
    return float(torch.relu(-stretch(case, "head")).mean())


def grown(case: Case) -> float:
    """Only lengths that became longer."""
    return float(torch.relu(stretch(case, "head")).mean())


def uneven(case: Case) -> float:
    """Lengths that changed otherwise than the others: the arrangement without its scale."""
    values = stretch(case, "head")
    return float((values - values.mean()).abs().mean())


def from_real(case: Case) -> float:
    """Arrangement of the targets' neighbourhoods, held against the targets themselves."""
    return float(stretch(case, "head", "real").abs().mean())


def overlap(space: str = "head", k: int = 7) -> Callable[[Case], float]:
    """Share of the K nearest neighbours that are others among the pruned outputs."""

    def measure(case: Case) -> float:
        near = []
        for origin in ("dense", "made"):
            logs = case.logs(origin, origin, space).clone().fill_diagonal_(math.inf)
            near.append(torch.zeros_like(logs).scatter_(1, logs.topk(k, 1, largest=False).indices, 1.0))
        return 1 - float((near[0] * near[1]).sum()) / (k * len(near[0]))

    return measure


def mixed_up(space: str = "head") -> Callable[[Case], float]:
    """Mean log rank of its own dense output among all, from each pruned one: 0 where it is the nearest."""

    def measure(case: Case) -> float:
        logs = case.logs("made", "dense", space)
        return float((1 + (logs < logs.diagonal()[:, None]).sum(1)).double().log().mean())

    return measure


def uncovered(k: int, around: Origin = "dense", space: str = "head") -> Callable[[Case], float]:
    """Share of balls to the K-th neighbour that no pruned output falls in (Naeem et al. 2020)."""

    def measure(case: Case) -> float:
        view: View = getattr(case, around)
        return 1 - density_coverage(view.features(space), case.made.features(space), k).coverage

    return measure


def thinned(k: int, around: Origin = "dense", space: str = "head") -> Callable[[Case], float]:
    """How much fewer such balls a pruned output lies in than a dense one (Naeem et al. 2020, density)."""

    def measure(case: Case) -> float:
        view: View = getattr(case, around)
        dense, made = (
            density_coverage(view.features(space), x.features(space), k) for x in (case.dense, case.made)
        )
        return dense.density - made.density

    return measure


def kernel(space: str = "head", k: int = 7) -> Callable[[Case], float]:
    """Change of a Gaussian kernel density at each dense output; its width is the sample's own radius."""

    def measure(case: Case) -> float:
        width = case.radius("dense", "dense", space, k)[:, None]
        densities = [
            torch.logsumexp(
                (-0.5 * (2 * (case.logs("dense", origin, space) - width)).exp()).fill_diagonal_(-math.inf), 1
            )
            for origin in ("dense", "made")
        ]
        return float((densities[1] - densities[0]).abs().mean())

    return measure


def at_places(place: int, k: int = 7) -> Callable[[Case], float]:
    """Crowd of the patches at one place of all images, mean over places of a map of the extractor."""

    def measure(case: Case) -> float:
        def rows(view: View) -> Tensor:
            return view.maps()[place].flatten(2).permute(2, 0, 1)

        count = rows(case.dense).shape[0]
        places = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:PLACES].tolist()
        near = case.keep(
            ("places", place, k),
            lambda: [Neighbourhoods.build(rows(case.dense)[n], k) for n in places],
            "dense",
        )
        found = [one.compare(rows(case.made)[n]).crowd for one, n in zip(near, places, strict=True)]
        return sum(found) / len(found)

    return measure


def mmd(space: str = "head", to: Origin = "dense") -> Callable[[Case], float]:
    """MMD² to the dense outputs or to the targets."""

    def measure(case: Case) -> float:
        view: View = getattr(case, to)
        reference = case.keep(("kernel", space, to), lambda: KernelReference(view.features(space)), "dense")
        return reference.mmd2(case.made.features(space))

    return measure


def frechet(to: Origin) -> Callable[[Case], float]:
    """Fréchet distance."""
    return lambda case: frechet_distance(getattr(case, to).features("head"), case.made.features("head"))


def paired(space: str, to: Origin = "dense") -> Callable[[Case], float]:
    """Mean distance of each output's features to those of the dense one, or of the target."""
    return lambda case: float(
        (case.made.features(space) - getattr(case, to).features(space)).norm(dim=1).mean()
    )


def distance(to: Origin) -> Callable[[Case], float]:
    """L1 of the images."""
    return lambda case: image_l1(case.made.images, getattr(case, to).images)


def dulled(case: Case) -> float:
    """Change of the mean step between neighbouring pixels, as a log ratio."""

    def steps(images: Tensor) -> float:
        return float(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean())

    return abs(math.log(steps(case.made.images) / steps(case.dense.images)))


def _balance(case: Case, critic_too: bool) -> float:
    dense_real, dense_fake, judged = (v.critic()[-1] for v in (case.real, case.dense, case.made))
    pruned = (case.judged("real"), case.judged("made")) if critic_too else (dense_real, judged)
    return balance_gap(dense_real, dense_fake, judged, *pruned)


def whole_balance(case: Case) -> float:
    """The shipped balance gap."""
    return _balance(case, True)


def judged_change(case: Case) -> float:
    """Its first part: how differently the dense discriminator judges what is made."""
    return _balance(case, False)


def disagreement(case: Case) -> float:
    """Its second part: 1 − correlation of the two discriminators."""
    return _balance(case, True) - _balance(case, False)


def less_real(case: Case) -> float:
    """Signed: how much less real the pruned outputs look to the dense discriminator."""
    return float(margins(case.dense.critic()[-1], case.made.critic()[-1]).mean())


def patch_change(case: Case) -> float:
    """Change of each patch's logit, without a mean over the image first."""
    return float((case.dense.critic()[-1] - case.made.critic()[-1]).abs().mean())


def feature_matching(case: Case) -> float:
    """Change of all activations of the dense discriminator, each layer in units of its mean."""
    rows = zip(case.dense.critic()[:-1], case.made.critic()[:-1], strict=True)
    return float(sum((a - b).abs().mean() / a.abs().mean() for a, b in rows))


def outmatched(case: Case) -> float:
    """Margin of the pruned discriminator over the pruned generator, in units of its logits' spread."""
    real, made = case.judged("real"), case.judged("made")
    return float(margins(real, made).mean() / torch.cat([real, made]).std())


def cheapness(case: Case) -> float:
    """Fewer multiplications count as worse: at equal parameters they differ several-fold."""
    network = case.bench.scorer.networks["generator"]
    return -float(network.cost.of("macs", np.array(case.plan["generator"])))


GRID = tuple(name for name in SPACES if name != "head" and not re.fullmatch(r"critic \d", name))
"""Spaces that the formulas of a set are tried in, beside ``head``."""
AROUND_DENSE: tuple[tuple[Origin, Origin], tuple[Origin, Origin]] = (("dense", "made"), ("dense", "dense"))
AROUND_MADE: tuple[tuple[Origin, Origin], tuple[Origin, Origin]] = (("made", "dense"), ("made", "made"))
AROUND_REAL: tuple[tuple[Origin, Origin], tuple[Origin, Origin]] = (("real", "made"), ("real", "dense"))
TO_REAL: tuple[tuple[Origin, Origin], tuple[Origin, Origin]] = (("made", "real"), ("dense", "real"))
FORMULAS: dict[str, Formula] = {
    "crowd": Formula("density", crowd()),
    "arrangement": Formula("density", arrangement()),
    **{f"crowd, {space}": Formula("density", crowd(space)) for space in GRID},
    **{f"arrangement, {space}": Formula("density", arrangement(space)) for space in GRID},
    **{
        f"crowd, patches, ε = {epsilon:g}": Formula("density", crowd("patches", epsilon=epsilon))
        for epsilon in (0.03, 0.1, PATCH_EPSILON, 1)
    },
    **{f"crowd, K = {k}": Formula("density", crowd(k=k)) for k in (3, 15, 30)},
    **{f"arrangement, K = {k}": Formula("density", arrangement(k=k)) for k in (3, 15, 30)},
    **{
        f"crowd, all stages + std, K = {k}": Formula("density", crowd("all stages + std", k))
        for k in (3, 15, 30)
    },
    **{
        f"{name}, {probe} images": Formula("density", formula, probe)
        for probe in ("mirrored", "train", "augmented")
        for name, formula in (("crowd", crowd()), ("arrangement", arrangement()))
    },
    "crowd around dense": Formula("density", change(*AROUND_DENSE, "absolute")),
    "lost around dense": Formula("density", change(*AROUND_DENSE, "side")),
    "gained around dense": Formula("density", change(*AROUND_DENSE[::-1], "side")),
    "divergence dense to pruned": Formula("density", change(*AROUND_DENSE, "signed")),
    "crowd around pruned": Formula("density", change(*AROUND_MADE, "absolute")),
    "lost around pruned": Formula("density", change(*AROUND_MADE, "side")),
    "gained around pruned": Formula("density", change(*AROUND_MADE[::-1], "side")),
    "divergence pruned to dense": Formula("density", change(*AROUND_MADE, "signed")),
    "own crowds": Formula("density", change(("made", "made"), ("dense", "dense"), "absolute")),
    "own crowds, closer": Formula("density", change(("dense", "dense"), ("made", "made"), "side")),
    "own crowds, looser": Formula("density", change(("made", "made"), ("dense", "dense"), "side")),
    "own crowds, blocks": Formula(
        "density", change(("made", "made"), ("dense", "dense"), "absolute", "all stages + std")
    ),
    "lost around real": Formula("density", change(*AROUND_REAL, "side")),
    "crowd around real, signed": Formula("density", change(*AROUND_REAL, "signed")),
    "away from real, signed": Formula("density", change(*TO_REAL, "signed")),
    "away from real, all stages": Formula("density", change(*TO_REAL, "signed", "all stages + std")),
    "away from real, critic": Formula("density", change(*TO_REAL, "signed", "critic")),
    "lost around real, all stages": Formula("density", change(*AROUND_REAL, "side", "all stages + std")),
    "lost around real, critic": Formula("density", change(*AROUND_REAL, "side", "critic")),
    "arrangement, shrunk": Formula("density", shrunk),
    "arrangement, grown": Formula("density", grown),
    "arrangement, without scale": Formula("density", uneven),
    "arrangement of the targets": Formula("density", from_real),
    **{f"other neighbours, K = {k}": Formula("density", overlap(k=k)) for k in (7, 15, 30)},
    "other neighbours, all stages": Formula("density", overlap("all stages + std")),
    "other neighbours, critic": Formula("density", overlap("critic")),
    "mixed up": Formula("density", mixed_up()),
    "mixed up, all stages": Formula("density", mixed_up("all stages + std")),
    "mixed up, critic": Formula("density", mixed_up("critic")),
    **{f"uncovered dense balls, K = {k}": Formula("density", uncovered(k)) for k in (5, 15)},
    **{f"uncovered real balls, K = {k}": Formula("density", uncovered(k, "real")) for k in (5, 15)},
    **{f"thinned dense balls, K = {k}": Formula("density", thinned(k)) for k in (5, 15)},
    **{f"thinned real balls, K = {k}": Formula("density", thinned(k, "real")) for k in (5, 15)},
    "kernel density": Formula("density", kernel()),
    "kernel density, all stages": Formula("density", kernel("all stages + std")),
    "crowd at places, block 4": Formula("density", at_places(1)),
    "crowd at places, block 10": Formula("density", at_places(2)),
    "MMD²": Formula("distribution", mmd()),
    **{f"MMD², {space}": Formula("distribution", mmd(space)) for space in GRID},
    "MMD² to real": Formula("distribution", mmd(to="real")),
    **{f"MMD² to real, {space}": Formula("distribution", mmd(space, "real")) for space in GRID},
    "MMD², augmented images": Formula("distribution", mmd(), "augmented"),
    "MMD², mirrored images": Formula("distribution", mmd(), "mirrored"),
    "MMD², train images": Formula("distribution", mmd(), "train"),
    "Fréchet": Formula("distribution", frechet("dense")),
    "Fréchet to real": Formula("distribution", frechet("real")),
    "features": Formula("paired", paired("head")),
    **{f"features, {space}": Formula("paired", paired(space)) for space in GRID},
    "features to real": Formula("paired", paired("head", "real")),
    "L1": Formula("paired", distance("dense")),
    "L1 to real": Formula("paired", distance("real")),
    "dulled": Formula("paired", dulled),
    "balance": Formula("balance", whole_balance),
    "balance, first part": Formula("balance", judged_change),
    "balance, second part": Formula("balance", disagreement),
    "less real": Formula("balance", less_real),
    "change by patch": Formula("balance", patch_change),
    "feature matching": Formula("balance", feature_matching),
    "outmatched": Formula("balance", outmatched),
    "multiplications": Formula("shape", cheapness),
}
"""Name → formula. One line more and the next run computes it; a changed formula takes another name."""


# Rehearsals


class Enough(Exception):
    """A rehearsal has gone through its last mark."""


class Rehearsal(PairedTrainer):
    """A finetuning that is measured on the way and does not go to its end.

    Args:
        on_mark: called with the steps done and the averaged generator so far.
        marks: numbers of steps; it ends after the last.
        length: steps in which the learning rate falls to 0; None = as the options say.
        generator, discriminator, options, teacher, ingredients, dense: see :class:`PairedTrainer`.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        options: TrainingOptions,
        teacher: Lessons,
        ingredients: Ingredients = NO_INGREDIENTS,
        dense: DensePair | None = None,
        *,
        pairs: PairedImages,
        marks: Sequence[int],
        on_mark: Callable[[int, nn.Module], None],
        length: int | None = None,
    ) -> None:
        super().__init__(generator, discriminator, options, teacher, ingredients, dense)
        self.pairs, self.marks, self.on_mark, self.length = pairs, marks, on_mark, length

    def _share(self, started: float, steps_per_epoch: int) -> float:
        if self.length is None:
            return super()._share(started, steps_per_epoch)
        return min(1.0, self.steps / self.length)

    def step(self, *arguments: Any, **more: Any) -> dict[str, Tensor]:
        """One update, and the measurement when it is due."""
        losses = super().step(*arguments, **more)
        done = self.steps + 1
        if done in self.marks:
            self.on_mark(done, self.result(self.pairs))
        if done >= max(self.marks):
            raise Enough
        return losses

    def go(self) -> None:
        """Train up to the last mark; a training that ends before has no later marks."""
        try:
            self.fit(self.pairs)
        except Enough:
            return


FIGURES = ("KID", "L1", "MMD²", "crowd", "arrangement")
"""What rehearsals are measured by: two distances to the real images, three gaps to the dense outputs."""


class Stage:
    """Rehearses plans with one seed that no finetuning of the study has.

    Args:
        options: of the study.
    """

    def __init__(self, options: calibrate.Options) -> None:
        self.bench = Workbench.build(settings_of(options, options.elastic))
        self.seed = Sizes.of(options).seeds

    def figures(self, generator: nn.Module) -> dict[str, float]:
        """``FIGURES`` on val images, as finetuned plans are measured."""
        judge = self.bench.judge
        yardstick = judge.yardstick
        made = to_float(to_uint8(run_batched(generator, judge.flipped_inputs)))
        look = yardstick.extractor.look(made)
        count = len(yardstick.inputs)
        gaps, _ = yardstick.generator_gaps(made[:count], look.first(count))
        values = (
            kid(judge.real_features, look.features),
            image_l1(made[:count], yardstick.targets),
            *(gaps[term] for term in ("mmd_gap", "crowd_gap", "arrangement_gap")),
        )
        return dict(zip(FIGURES, values, strict=True))

    def __call__(
        self, plan: NamedPlan, marks: Sequence[int], length: int | None
    ) -> dict[int, tuple[dict[str, float], float]]:
        """Steps → figures, and the processor seconds up to there, without the measurements before."""
        found: dict[int, tuple[dict[str, float], float]] = {}
        pair = self.bench.pair(Trial(plan.label, plan.plan, self.seed))
        options = self.bench.settings.options(self.seed, self.bench.task)
        assert isinstance(options, TrainingOptions), "a study of formulas has pairs"
        generator, discriminator = (trainable_copy(network, options.amp) for network in pair)
        torch.manual_seed(self.seed)
        spent, started = 0.0, time.process_time()

        def on_mark(steps: int, network: nn.Module) -> None:
            nonlocal spent, started
            spent += time.process_time() - started
            started = time.process_time()
            figures = self.figures(network.to(memory_format=torch.contiguous_format))
            found[steps] = figures, spent + time.process_time() - started
            started = time.process_time()

        Rehearsal(
            generator,
            discriminator,
            options,
            self.bench.lessons(options),
            self.bench.settings.ingredients,
            self.bench.dense,
            pairs=self.bench.train,
            marks=marks,
            on_mark=on_mark,
            length=length,
        ).go()
        return found


def rehearsal_names() -> dict[str, tuple[int | None, int, str]]:
    """Name in the log → length of the schedule (None = the real one), steps, figure."""
    names: dict[str, tuple[int | None, int, str]] = {}
    for figure in FIGURES:
        names |= {f"{steps} steps: {figure}": (None, steps, figure) for steps in MARKS}
        names |= {f"{steps} steps of their own: {figure}": (steps, steps, figure) for steps in SHORT}
    return names


# The road


class Journal:
    """Append-only ``formulas.jsonl``: one line per plan and formula.

    Attributes:
        values: (plan key, formula) → its value and the processor seconds that it takes.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.values: dict[tuple[str, str], tuple[float, float]] = {}
        self._file = AppendLog(path, fingerprint, self._read, kind="log of formulas", entries="values")

    def _read(self, entry: Mapping[str, Any]) -> None:
        self.values[entry["plan"], entry["formula"]] = float(entry["value"]), float(entry["seconds"])

    def append(self, plan: Plan, formula: str, value: float, seconds: float) -> None:
        """Keep a value; one that is not finite is refused.

        Raises:
            ValueError: the formula has no value for this plan.
        """
        if not math.isfinite(value):
            raise ValueError(f"{formula} of plan {plan.key} is {value}; it must be finite")
        entry = {"plan": plan.key, "formula": formula, "value": value, "seconds": round(seconds, 4)}
        self._file.append(entry)
        self.values[plan.key, formula] = value, seconds


def main(options: Options) -> None:
    """Compute what the log does not have, and tabulate."""
    console = Console()
    torch.set_num_threads(1)
    wanted_formulas(options.only)
    if options.steps < min(MARKS):
        raise UserError(f"--steps is {options.steps}; the shortest rehearsal has {min(MARKS)}")
    given = calibrate.Options(resume=options.study, report=True)
    own, study = reopen_study(given, options.study)
    # density 0: its rows say what another density adds to the rest
    own = replace(own, weights=replace(Weights(), density=0.0))
    base = read_study(own, study)
    folder = options.output or options.study / "formulas"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder} ({error.strerror}); use another --output"
        ) from error
    # without parts it only looks in, also while another process is at work there
    with cli.alone(folder) if options.parts else nullcontext():
        try:
            journal = work(options, own, study, base.plans, folder, Watch(console))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; what is in {folder} stays; the same command goes on") from None
    table = tabulate(base, journal)
    write_json(
        folder / "formulas.json", plain(named({**table, "rows": [named(row) for row in table["rows"]]}))
    )
    write_text(folder / "table.md", markdown(table))
    console.print(markdown(table), highlight=False, soft_wrap=True)
    console.print(f"everything is in {folder}", highlight=False, soft_wrap=True)


def work(
    options: Options,
    own: calibrate.Options,
    study: StudyFolder,
    plans: Sequence[NamedPlan],
    folder: Path,
    watch: Watch,
) -> Journal:
    """Fill the log."""
    journal = Journal(folder / "formulas.jsonl", calibrate.log_header(study.finetuned))
    if "instant" in options.parts:
        wanted = wanted_formulas(options.only)
        # probe by probe: nothing is shared between them, and the usual one is there for all plans first
        jobs = [
            (plan.plan, missing)
            for probe in dict.fromkeys(FORMULAS[name].probe for name in wanted)
            for plan in plans
            if (
                missing := [
                    name
                    for name in wanted
                    if FORMULAS[name].probe == probe and (plan.plan.key, name) not in journal.values
                ]
            )
        ]
        if jobs:
            bench = Bench(own)
            with watch.stage("formulas", len(jobs)) as stage:
                for plan, names in jobs:
                    measure(bench, plan, names, journal)
                    stage.advance()
    if "rehearsals" in options.parts:
        rehearse(own, plans, journal, watch, options.steps)
    return journal


def wanted_formulas(pattern: str) -> list[str]:
    """Names of the formulas that a regular expression finds.

    Raises:
        UserError: it is none, or finds nothing.
    """
    try:
        found = [name for name in FORMULAS if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--only {pattern!r} is no regular expression: {error}") from error
    if not found:
        raise UserError(
            f"--only {pattern!r} finds no formula; names are such as {', '.join([*FORMULAS][:3])}"
        )
    return found


def measure(bench: Bench, plan: Plan, formulas: Sequence[str], journal: Journal) -> None:
    """Compute some formulas of a plan."""
    memo = Memo()
    cases = {probe: Case(bench, plan, probe, memo) for probe in bench.probes}
    for name in formulas:
        formula = FORMULAS[name]
        value, seconds = memo.cost(partial(formula.measure, cases[formula.probe]))
        journal.append(plan, name, value, seconds)


def rehearse(
    own: calibrate.Options, plans: Sequence[NamedPlan], journal: Journal, watch: Watch, most: int
) -> None:
    """Go through the first steps of every plan's finetuning, then through the short ones."""
    names = {name: row for name, row in rehearsal_names().items() if row[1] <= most}
    jobs = [
        (length, plan, marks)
        for length in (None, *SHORT)
        if (marks := sorted({steps for schedule, steps, _ in names.values() if schedule == length}))
        for plan in plans
        if any((plan.plan.key, name) not in journal.values for name, row in names.items() if row[0] == length)
    ]
    if not jobs:
        return
    stage = Stage(own)
    with watch.stage("rehearsals", len(jobs)) as bar:
        for length, plan, marks in jobs:
            found = stage(plan, marks, length)
            for name, (schedule, steps, figure) in names.items():
                if schedule == length and steps in found:
                    figures, seconds = found[steps]
                    journal.append(plan.plan, name, figures[figure], seconds)
            bar.advance(note=plan.label)


# The report


@dataclass(frozen=True)
class Entry:
    """Something that might predict the finetuned KID.

    Attributes:
        name, family: of the formula; rehearsals and what the study logged itself have families of their own.
        gap: (k,) lower is better.
        seconds: of one processor for a plan, median over the plans; NaN where nothing was timed.
    """

    name: str
    family: str
    gap: NDArray[np.float64]
    seconds: float

    @property
    def score(self) -> NDArray[np.float64]:
        """(k,) as a reward term counts it: 0 = the uniform plan, which is the first; higher is better.

        As in ``envs.rewards``, but for the spread, which is that of the study's own plans.
        """
        unit = robust_spread(self.gap, abs(float(self.gap[0])))
        return np.clip((self.gap[0] - self.gap) / unit, *SCORE_BOUNDS)


class Row(NamedTuple):
    """How well an entry predicts the mean finetuned KID.

    Attributes:
        name, family, seconds: of the entry.
        tau, better_half: Kendall's tau over all plans and the better half of them.
        regret: of its pick.
        like_mmd: tau of the entry and MMD².
        beyond_mmd: partial tau, MMD² held fixed.
        beside: base and weight → (tau, regret) of the base with so much of this entry.
    """

    name: str
    family: str
    tau: Interval
    better_half: Interval
    regret: float
    like_mmd: float
    beyond_mmd: float
    beside: dict[str, tuple[float, float]]
    seconds: float


class Luck(NamedTuple):
    """What is left of the best of many.

    Attributes:
        name: the best on all plans.
        gain: its tau minus the tau without it.
        chance: the gain that it would need: 95 % of the resamples in which no formula gains anything have no
            larger one, each in units of its own standard deviation.
        p: share of such resamples with a gain that is larger than any here, in the same units.
        confirmed: gain on the other half of what was best on a random half: mean, 5 and 95 % of the splits.
        chosen: name → share of the splits in which it was the best, the most frequent ones first.
    """

    name: str
    gain: float
    chance: float
    p: float
    confirmed: Interval
    chosen: dict[str, float]


def entries_of(study: calibrate.Study, journal: Journal) -> list[Entry]:
    """What is known of every finished plan."""
    keys = [plan.plan.key for plan in study.plans]
    families: dict[str, str] = {name: formula.family for name, formula in FORMULAS.items()}
    families |= dict.fromkeys(rehearsal_names(), "rehearsal")
    entries = []
    for name, family in families.items():
        found = [journal.values.get((key, name)) for key in keys]
        if all(one is not None for one in found):
            values, seconds = np.array(found, dtype=np.float64).T
            entries.append(Entry(name, family, values, float(np.median(seconds))))
    return [*logged(study), *entries, *extrapolated(entries)]


def logged(study: calibrate.Study) -> list[Entry]:
    """The totals without density, and the predicted recovery, as the study has them."""
    predicted = any(column.name == "recovery_gap" for column in study.columns)
    names = {
        "total": "total without density" if predicted else "total without density and recovery",
        "total without recovery": "total without density and recovery",
        "recovery_gap": "predicted recovery",
        f"raw {KID}": "KID before finetuning",
    }
    return [
        Entry(names[column.name], "study", -column.better, math.nan)
        for column in study.columns
        if column.weights == calibrate.OWN and column.name in names
    ]


def extrapolated(entries: Sequence[Entry]) -> list[Entry]:
    """What the first epochs of the real schedule say about its end."""
    known = {entry.name: entry for entry in entries}
    marks = [f"{steps} steps: KID" for steps in MARKS[-3:]]
    if any(mark not in known for mark in marks):
        return []
    rows = np.array([known[mark].gap for mark in marks])
    logs = np.log(np.maximum(rows, 1e-3))
    slope = np.polyfit(np.log(MARKS[-3:]), logs, 1)[0]
    seconds = known[marks[-1]].seconds
    made = {
        "last slope: KID": rows[2] + (rows[2] - rows[1]),
        "power law: KID": logs[2] + slope * math.log(670 / MARKS[-1]),
        "mean of three epochs: KID": rows.mean(0),
    }
    return [Entry(name, "rehearsal", values, seconds) for name, values in made.items()]


FAMILIES_TRIED = {
    "density": ("density",),
    "shape": ("shape",),
    "rehearsals": ("rehearsal",),
    "all instant": ("density", "distribution", "paired", "balance"),
}
"""Which formulas the best is looked for among."""


def tabulate(study: calibrate.Study, journal: Journal) -> dict[str, Any]:
    """Everything that the report says."""
    entries = entries_of(study, journal)
    metric = study.results[KID].mean(1)
    known = {entry.name: entry for entry in entries}
    mmd_entry = known.get("MMD²")
    bases = {
        name: -known[place].gap
        for name, place in (
            ("fidelity and balance", "total without density and recovery"),
            ("with recovery", "total without density"),
        )
        if place in known
    }
    rows = [row_of(entry, metric, mmd_entry, bases) for entry in entries]
    chance: dict[str, Luck] = {}
    more: dict[str, Beyond] = {}
    for family, members in FAMILIES_TRIED.items():
        tried = [entry for entry in entries if entry.family in members]
        if not tried:
            continue
        scores = np.array([entry.score for entry in tried])
        names = [entry.name for entry in tried]
        if mmd_entry is not None:
            more[family] = beyond(tried, mmd_entry.gap, metric)
            chance[f"{family}, alone, against MMD²"] = luck(names, scores, mmd_entry.score, metric)
        for base, total in bases.items():
            for weight in BESIDE:
                key = f"{family}, weight {weight:g} beside {base}"
                chance[key] = luck(names, total + weight * scores, total, metric)
    return {
        "protocol": f"{len(metric)} plans, {study.results[KID].shape[1]} seeds; tau with the mean "
        f"finetuned KID, {LEVEL:.0%} bootstrap intervals over plans; seconds of one processor core per plan",
        "bases": {base: (kendall(total, -metric), regret(total, metric)) for base, total in bases.items()},
        "rows": rows,
        "luck": chance,
        "beyond": more,
    }


def row_of(
    entry: Entry,
    metric: NDArray[np.float64],
    mmd_entry: Entry | None,
    bases: Mapping[str, NDArray[np.float64]],
) -> Row:
    """How well one entry does."""
    half = better_half(metric)
    score, like, beyond = entry.score, math.nan, math.nan
    tau = kendall_interval(-entry.gap, -metric)
    if mmd_entry is not None:
        like, other = kendall(entry.gap, mmd_entry.gap), kendall(mmd_entry.gap, metric)
        rest = (1 - like**2) * (1 - other**2)
        beyond = (tau.value - like * other) / math.sqrt(rest) if rest > 1e-9 else math.nan
    beside = {}
    for base, total in bases.items():
        for weight in BESIDE:
            joint = total + weight * score
            beside[f"{weight:g} beside {base}"] = (kendall(joint, -metric), regret(joint, metric))
    return Row(
        entry.name,
        entry.family,
        tau,
        kendall_interval(-entry.gap[half], -metric[half]),
        regret(-entry.gap, metric),
        like,
        beyond,
        beside,
        entry.seconds,
    )


def luck(
    names: Sequence[str],
    scores: NDArray[np.float64],
    base: NDArray[np.float64],
    metric: NDArray[np.float64],
    seed: int = 0,
) -> Luck:
    """The largest gain over a base, what chance alone makes of it, and what another half says of it.

    The chance is that of Hansen, "A Test for Superior Predictive Ability", J. Business & Economic Statistics
    23, 2005: the plans are resampled, each formula's gain is counted from its gain on all plans, so that none
    gains, and divided by its standard deviation, so that wild formulas do not set the mark for steady ones.

    Args:
        names: v formulas.
        scores: (v, k) higher is better.
        base: (k,) what they are held against.
        metric: (k,) lower is better.
        seed: of resamples and splits.
    """
    random, k = np.random.default_rng(seed), len(metric)
    both = np.vstack([scores, base])

    def gains(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        taus = weighted_taus(both, metric, counts)
        return np.nan_to_num(taus[:, :-1] - taus[:, -1:])

    whole = gains(np.ones((1, k)))[0]
    resamples = random.multinomial(k, np.full(k, 1 / k), size=RESAMPLES).astype(np.float64)
    drawn = gains(resamples)
    unit = np.maximum(drawn.std(0), 1e-9)
    largest = ((drawn - whole) / unit).max(1)
    halves = np.zeros((SPLITS, k))
    for row in halves:
        row[random.permutation(k)[: k // 2]] = 1
    best = gains(halves).argmax(1)
    confirmed = gains(1 - halves)[np.arange(SPLITS), best]
    places, times = np.unique(best, return_counts=True)
    frequent = sorted(zip(times.tolist(), places.tolist(), strict=True), reverse=True)[:5]
    place = int(whole.argmax())
    return Luck(
        names[place],
        float(whole[place]),
        float(np.quantile(largest, 0.95) * unit[place]),
        float((largest >= (whole / unit).max()).mean()),
        Interval(float(confirmed.mean()), *(float(q) for q in np.quantile(confirmed, (0.05, 0.95)))),
        {names[one]: count / SPLITS for count, one in frequent},
    )


class Beyond(NamedTuple):
    """The largest partial tau of many formulas, MMD² held fixed.

    Attributes:
        name: of which formula.
        tau: its partial tau.
        chance: 95 % quantile of the largest one where MMD² says all that can be said.
        p: share of such cases with a larger one.
    """

    name: str
    tau: float
    chance: float
    p: float


def beyond(
    entries: Sequence[Entry],
    held: NDArray[np.float64],
    metric: NDArray[np.float64],
    seed: int = 0,
) -> Beyond:
    """What the best of many formulas knows that MMD² does not, and what chance makes of it.

    Without knowledge beyond it, the metric's ranks are a line through the ranks of ``held`` plus residuals
    that belong to no plan: they are permuted (Freedman & Lane, J. Business & Economic Statistics 1, 1983).

    Args:
        entries: formulas.
        held: (k,) gap that is held fixed.
        metric: (k,) lower is better.
        seed: of the permutations.
    """
    random, fixed = np.random.default_rng(seed), stats.rankdata(held)
    ranks = stats.rankdata(metric)
    line = np.polyval(np.polyfit(fixed, ranks, 1), fixed)
    drawn = np.array([line + random.permutation(ranks - line) for _ in range(RESAMPLES)])
    other, given = _pairs(np.vstack([metric, drawn])), _pairs(held[None])
    own = _pairs(np.array([entry.gap for entry in entries]))
    like, known = own @ given.T, given @ other.T
    with np.errstate(invalid="ignore", divide="ignore"):
        partial = (own @ other.T - like * known) / np.sqrt((1 - like**2) * (1 - known**2))
    partial[like[:, 0] > 1 - 1e-9] = -1  # MMD² itself
    partial[~np.isfinite(partial)] = -1  # its reverse, or a metric that it orders: nothing is left to know
    largest, place = partial.max(0), int(partial[:, 0].argmax())
    return Beyond(
        entries[place].name,
        float(largest[0]),
        float(np.quantile(largest[1:], 0.95)),
        float((largest[1:] >= largest[0]).mean()),
    )


def _pairs(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """(…, k) → (…, k²): signs of all differences, of length 1: a product of two rows is their tau-b."""
    signs = np.sign(rows[:, :, None] - rows[:, None, :]).reshape(len(rows), -1)
    return signs / np.maximum(np.linalg.norm(signs, axis=1, keepdims=True), 1e-9)


def markdown(table: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    bases = table["bases"]
    lines = [f"{table['protocol']}.", ""]
    lines += [f"- {base}: tau {tau:.2f}, regret {lost:.1%}" for base, (tau, lost) in bases.items()]
    beside = [f"{weight:g} beside {base}" for base in bases for weight in BESIDE]
    headings = ["formula", "τ", "better half", "regret", "τ with MMD²", "partial τ", *beside, "s"]
    for family in dict.fromkeys(row.family for row in table["rows"]):
        tabled = [headings]
        for row in sorted(
            (r for r in table["rows"] if r.family == family), key=lambda r: -_known(r.tau.value)
        ):
            cells = [
                row.name,
                _interval(row.tau),
                _number(row.better_half.value),
                f"{row.regret:.1%}",
                _number(row.like_mmd),
                _number(row.beyond_mmd),
                *(f"{row.beside[name][0]:.2f}, {row.beside[name][1]:.1%}" for name in beside),
                "" if math.isnan(row.seconds) else f"{row.seconds:.2f}",
            ]
            tabled.append(cells)
        lines += ["", f"## {family}", "", markdown_table(tabled)]
    if table["luck"]:
        heads = "formulas|best|gain in τ|chance, 95 %|p|chosen on a half, gain on the other|most often chosen"
        tabled = [heads.split("|")]
        for name, found in table["luck"].items():
            often = ", ".join(f"{one} {share:.0%}" for one, share in list(found.chosen.items())[:3])
            numbers = [f"{found.gain:+.2f}", f"{found.chance:.2f}", f"{found.p:.2f}"]
            tabled.append([name, found.name, *numbers, _interval(found.confirmed), often])
        lines += ["", "## The best of many", "", markdown_table(tabled)]
    if table["beyond"]:
        tabled = [["formulas", "largest partial τ", "of", "chance, 95 %", "p"]]
        for name, one in table["beyond"].items():
            tabled.append([name, f"{one.tau:.2f}", one.name, f"{one.chance:.2f}", f"{one.p:.3f}"])
        lines += ["", "## Beyond MMD²", "", markdown_table(tabled)]
    return "\n".join(lines) + "\n"


def _known(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _interval(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "–"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
