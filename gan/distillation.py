"""What a small network learns from a large one beyond its outputs: feature maps, perceptual distances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from gan.errors import UserError, unknown
from gan.features import SMALLEST, load_differentiable_stages
from gan.groups import CONVOLUTIONS, NORMS, ChannelGroup, norm_channels
from gan.losses import kernel_alignment, paired_input, relative_distance, scaled_error
from gan.runtime import frozen_copy
from gan.taps import recorded

SMALLEST_MAP = 4
"""Height in pixels of the smallest maps that are compared. Below it a batch of 16 images has fewer places
than channels, and then any features are alike to the alignment (and an adapter fits any)."""
PLACES = 64
"""Places of a map that are compared, drawn anew at each step: an 8 × 8 map is taken whole, of a larger one
enough to tell 256 channels apart in a batch of 16."""
PERCEIVED_BY = "EfficientNet-Lite1, three stages, three quarters of the size"
PERCEPTUAL = 100.0
"""Default weight of the perceptual distance. Less leaves grain, more washes colours out."""


@dataclass(frozen=True)
class Ingredients:
    """What finetuning adds to native losses and output distillation; all but the perceptual distance is off
    by default.
    """

    features: Literal["none", "alignment", "adapters"] = "none"
    """Distil the generator's feature maps: by kernel alignment, or through 1 × 1 adapters that are trained
    along and thrown away."""
    feature_weight: float = 50.0
    """Weight of that; its gradient is then about as long as that of the output distillation."""
    variants: int = 0
    """Draw the augmentation of an image from so many fixed ones, so that the teacher's outputs and features
    are computed once and remembered (0.1 MB for each image and variant); 0 draws anew in every epoch."""
    matching: Literal["none", "target", "teacher", "both"] = "none"
    """Match what the dense discriminator's layers see in the target, in the teacher's output, or in both."""
    matching_weight: float = 10.0
    """Weight of that."""
    perceptual: float | None = None
    """Weight of the distance to the target in early features of EfficientNet-Lite1, with which no figure is
    measured; 0 is off. By default 100 where images are pairs."""
    unseen: int = 0
    """Learn from so many further images in each step that the dense generator has not memorised (turned, and
    patched from several): from its outputs alone, and from its features where these are distilled."""
    adversary: Literal["pruned", "dense", "both"] = "pruned"
    """Who is to be fooled: the pruned discriminator, the dense one (it then takes the pruned one's place in
    the pair), or both, by the mean of the two losses."""
    schedule: Literal["linear", "cosine", "restarts"] = "linear"
    """Of the learning rate: constant, then linearly to 0; half a cosine; or cosines with warm restarts."""
    online: bool = False
    """The dense pair trains on beside the pruned one, which is taught by its outputs of the moment."""
    online_rate: float = 0.4
    """Learning rate of that dense pair as a share of the pruned one's: by default that of pretraining."""

    @property
    def teaches_maps(self) -> bool:
        return self.features != "none"

    @property
    def needs_dense(self) -> bool:
        """Whether the dense pair must be at hand, not just its generator's outputs."""
        return (
            self.teaches_maps
            or self.variants > 0
            or self.unseen > 0
            or self.matching != "none"
            or self.adversary != "pruned"
            or self.online
        )

    def settled(self, paired: bool = True) -> Ingredients:
        """With a number where the default depends on whether images are pairs."""
        if self.perceptual is not None:
            return self
        return replace(self, perceptual=PERCEPTUAL if paired else 0.0)

    def described(self, paired: bool = True) -> dict[str, Any]:
        """What results depend on, for the headers of logs: settled fields, and how images are perceived."""
        settled = self.settled(paired)
        seen = {"perceived_by": PERCEIVED_BY} if settled.perceptual else {}
        return {**asdict(settled), **seen}

    def check(self) -> None:
        """Refuse what no training can use.

        Raises:
            UserError: in one sentence.
        """
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if value is None:
                continue
            allowed = get_args(hint) if get_origin(hint) is Literal else ()
            if allowed and value not in allowed:
                raise unknown(field.name.replace("_", " "), value, allowed)
            if not allowed and not 0 <= value < math.inf:  # NaN too
                raise UserError(f"--{field.name.replace('_', '-')} is {value}; it must be 0 or more")
        if self.online and self.variants:
            raise UserError("an online teacher changes from step to step: leave out --online or --variants")
        if self.online and self.unseen:
            raise UserError(
                "an online teacher knows the training images only: leave out --online or --unseen"
            )


NO_INGREDIENTS = Ingredients(perceptual=0.0)
"""Native losses and output distillation alone."""


@dataclass(frozen=True)
class DensePair:
    """What is distilled from.

    Attributes:
        generator, discriminator: the dense networks; copied where they train, never changed.
        groups: the generator's channel groups.
    """

    generator: nn.Module
    discriminator: nn.Module
    groups: tuple[ChannelGroup, ...]


def behind(network: nn.Module, convolution: str) -> str:
    """Dotted name of the norm right behind a convolution in its Sequential, or of the convolution itself.

    A norm takes back what the convolution does to a channel's scale, so the maps behind it are what the next
    layer sees.
    """
    parent, _, place = convolution.rpartition(".")
    follower = f"{parent}.{int(place) + 1}" if place.isdigit() else ""
    modules = dict(network.named_modules())
    return follower if isinstance(modules.get(follower), NORMS) else convolution


def generator_taps(network: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[str, ...]:
    """Names of the modules whose outputs are compared: one per channel group, at matching depths."""
    taps = tuple(behind(network, group.name) for group in groups if group.resolution >= SMALLEST_MAP)
    if not taps:
        raise ValueError(f"no channel group makes maps of {SMALLEST_MAP} pixels or more: nothing to compare")
    return taps


def discriminator_taps(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose outputs are compared: every layer but the last, which makes the logits."""
    convolutions = [name for name, module in network.named_modules() if isinstance(module, CONVOLUTIONS)]
    return tuple(behind(network, name) for name in convolutions[:-1])


def some_places(maps: Tensor, moment: int) -> Tensor:
    """Features at up to ``PLACES`` places of maps (N, C, H, W): (N, k, C), in the maps' own precision.

    Args:
        moment: equal moments draw equal places. All phases of a map must have their turn: a transposed
            convolution makes its even and odd pixels with different weights.
    """
    size = maps.shape[-2] * maps.shape[-1]
    flat = maps.permute(0, 2, 3, 1).flatten(1, 2)  # no copy of maps that are in channels_last already
    if size <= PLACES:
        return flat
    random = torch.Generator().manual_seed(moment)
    return flat.index_select(1, torch.randperm(size, generator=random)[:PLACES].to(maps.device))


class Lesson(NamedTuple):
    """What a teacher says of a batch.

    Attributes:
        outputs: (N, 3, H, W) float32.
        features: tap → (N, k, C) at the places of ``moment``; empty where nobody asks for maps.
        moment: for :func:`some_places`.
    """

    outputs: Tensor
    features: Mapping[str, Tensor]
    moment: int


class Teacher:
    """The dense generator, asked for outputs and feature maps in one pass.

    With ``variants`` it remembers its answers to whole sets of images, 0.1 MB an image at 64 × 64 (its output
    in float16, 25 kB, and 74 kB of features). Answers to endless augmentations are not remembered: 10 epochs
    of 1,084 images would fill 1 GB, and no later epoch would ask for them again.

    Args:
        network: copied.
        taps: modules whose maps are asked for; may be empty.
        amp: run in bfloat16, which halves the time of a pass; the student does not see the difference.
    """

    def __init__(self, network: nn.Module, taps: Sequence[str], amp: bool) -> None:
        self.network = frozen_copy(network, amp)
        self.taps, self.amp = tuple(taps), amp
        self.device = next(network.parameters()).device
        self._known: dict[int, Lesson] = {}

    @torch.no_grad()
    def __call__(self, inputs: Tensor, moment: int) -> Lesson:
        """A live answer to inputs (N, 3, H, W)."""
        with (
            recorded(self.network, self.taps) as maps,
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp),
        ):
            outputs = self.network(inputs).float()
        return Lesson(outputs, {name: some_places(maps[name], moment) for name in self.taps}, moment)

    def remembered(self, variant: int, rows: Tensor) -> Lesson:
        """The answer to some rows of a set that :meth:`study` has seen."""
        known, rows = self._known[variant], rows.to(self.device)
        features = {name: maps[rows] for name, maps in known.features.items()}
        return Lesson(known.outputs[rows].float(), features, variant)

    def study(self, variant: int, inputs: Tensor, batch_size: int = 16) -> None:
        """Answer all inputs of a variant (N, 3, H, W), if that has not been done.

        In a fixed order, so that a resumed training is taught the same.
        """
        if variant in self._known:
            return
        lessons = [self(chunk.to(self.device), variant) for chunk in inputs.split(batch_size)]
        features = {name: torch.cat([lesson.features[name] for lesson in lessons]) for name in self.taps}
        outputs = torch.cat([lesson.outputs.half() for lesson in lessons])
        self._known[variant] = Lesson(outputs, features, variant)


class FeatureDistance(nn.Module):
    """Distance between the feature maps of a pruned and a dense generator at the same depths.

    ``alignment``: 1 − :func:`gan.losses.kernel_alignment`, in [0, 1], without any weights. ``adapters``: a
    1 × 1 convolution from the pruned to the dense width at each depth, then :func:`gan.losses.scaled_error`:
    Li et al., "GAN Compression", CVPR 2020, after Romero et al., "FitNets", ICLR 2015.

    Args:
        kind: which of the two.
        taps: from :func:`generator_taps`.
        student, teacher: the networks, for their widths.
        seed: of the adapters.
    """

    def __init__(
        self,
        kind: Literal["alignment", "adapters"],
        taps: Sequence[str],
        student: nn.Module,
        teacher: nn.Module,
        seed: int,
    ) -> None:
        super().__init__()
        self.kind, self.taps = kind, tuple(taps)
        self.adapters = nn.ModuleList()
        if kind == "adapters":
            random = torch.Generator().manual_seed(seed)
            for name in self.taps:
                narrow, wide = (_channels(network, name) for network in (student, teacher))
                adapter = nn.Linear(narrow, wide)  # of a place: what a 1 × 1 convolution is
                with torch.no_grad():
                    adapter.weight.normal_(0.0, narrow**-0.5, generator=random)
                    adapter.bias.zero_()
                self.adapters.append(adapter)
            self.to(next(student.parameters()).device)

    def forward(self, maps: Mapping[str, Tensor], lesson: Lesson) -> Tensor:
        """Mean over the taps, 0-d.

        Args:
            maps: tap → (N, c, H, W) of the pruned generator.
            lesson: of the dense one, for the same images.
        """
        distances = []
        for place, name in enumerate(self.taps):
            student = some_places(maps[name], lesson.moment).flatten(0, 1).float()
            teacher = lesson.features[name].flatten(0, 1).float()
            if self.kind == "adapters":
                distances.append(scaled_error(self.adapters[place](student), teacher))
            else:
                distances.append(1 - kernel_alignment(student, teacher))
        return torch.stack(distances).mean()


def _channels(network: nn.Module, tap: str) -> int:
    module = network.get_submodule(tap)
    count = norm_channels(module) if isinstance(module, NORMS) else module.out_channels
    assert isinstance(count, int)
    return count


class DiscriminatorMatching:
    """Distance of made images to wanted ones in the layers of the frozen dense discriminator.

    Wang et al., CVPR 2018; it has nothing to do with the network that figures are measured with.

    Args:
        network: the dense discriminator; copied.
        amp: run it in bfloat16.
    """

    def __init__(self, network: nn.Module, amp: bool) -> None:
        self.network = frozen_copy(network, amp)
        self.taps, self.amp = discriminator_taps(network), amp

    def __call__(self, inputs: Tensor, made: Tensor, wanted: Sequence[Tensor]) -> Tensor:
        """Mean over the wanted images of the relative distance, 0-d; all images (N, 3, H, W)."""
        maps = self._maps(inputs, made)
        with torch.no_grad():
            references = [self._maps(inputs, images) for images in wanted]
        return torch.stack([relative_distance(maps, reference) for reference in references]).mean()

    def _maps(self, inputs: Tensor, images: Tensor) -> list[Tensor]:
        with (
            recorded(self.network, self.taps) as maps,
            torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp),
        ):
            self.network(paired_input(inputs, images))
        return [maps[name].float() for name in self.taps]


def seen_at(height: int, width: int) -> int:
    """Pixels of the square at which a perceptual distance looks: three quarters of the images' longer side.

    A third less time than at full size, and what it trains is no worse; at least 32 pixels, at most 256.
    """
    return min(256, max(SMALLEST, 16 * round(0.75 * max(height, width) / 16)))


class PerceptualDistance:
    """Distance of images in early features of EfficientNet-Lite1, after Johnson et al., ECCV 2016.

    KID, FID, density and coverage are measured with Lite0, a sibling that was trained apart: what the loss
    pleases is not what the figures are made with.

    Runs in float32: depthwise convolutions are slower in bfloat16.

    Args:
        stages: from :func:`gan.features.load_differentiable_stages`; images (N, 3, H, W) → maps. By default
            those for the images that come, see :func:`seen_at`.
        device: where it runs.
    """

    def __init__(self, stages: nn.Module | None = None, device: str | torch.device = "cpu") -> None:
        self.stages, self.device = None if stages is None else stages.to(device), device

    def __call__(self, made: Tensor, targets: Tensor) -> Tensor:
        """Relative distance (0-d) of made images to targets, both (N, 3, H, W) in [−1, 1]."""
        return self.from_maps(made, self.maps(targets))

    @torch.no_grad()
    def maps(self, targets: Tensor) -> list[Tensor]:
        """What is seen in targets (N, 3, H, W), for several :meth:`from_maps`."""
        return self._stages(targets)(targets)  # type: ignore[no-any-return]

    def from_maps(self, made: Tensor, wanted: Sequence[Tensor]) -> Tensor:
        """Relative distance (0-d) of made images (N, 3, H, W) to targets of which these maps were seen."""
        return relative_distance(self._stages(made)(made), wanted)

    def _stages(self, images: Tensor) -> nn.Module:
        if self.stages is not None:
            return self.stages
        return load_differentiable_stages(image_size=seen_at(*images.shape[-2:]), device=str(self.device))
