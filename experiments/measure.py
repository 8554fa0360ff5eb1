"""What pruning is worth on this machine: size, memory and latency of the dense and the pruned network."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tyro.conf import Positional

from envs.budget import uniform_widths
from experiments import cli
from experiments.memory import MemoryJob, peaks_mb
from experiments.runs import RunFolder, check_least, open_run, plain, task_of, versions
from gan.checkpoints import load_network, read_recipe, save_tensors
from gan.cost import build_cost_model, published_macs
from gan.errors import UserError
from gan.evaluation import count
from gan.evaluations import PrunableNetwork
from gan.files import write_bytes, write_json, write_text
from gan.groups import find_groups
from gan.latency import layer_units
from gan.networks import GENERATORS, Architecture, initialise
from gan.onnx_writer import write_onnx
from gan.own_task import usual_multiple
from gan.runtime import OnnxNetwork
from gan.slicing import Slicer
from gan.stopwatch import Clocks, Job, Timing, read_clocks, speedup, take_turns
from gan.task_folder import find_task_folder
from gan.trial_cuts import brief

DESCRIPTION = """Measures the dense and the pruned generator side by side: multiply-accumulates, parameters,
file size, peak memory, and latency for one image with PyTorch and ONNX Runtime, on one thread and on all."""
EXAMPLES = (
    ("python experiments/measure.py runs/NAME", "the result of a run and the uniform plan; to measured.json"),
    ("python experiments/measure.py generator.safetensors --layers", "a weight file, layer by layer"),
    ("python experiments/measure.py unet_256 --macs 0.25 0.1", "uniform slices of a full-size network"),
)
DENSE = "dense"
ENGINES = {"torch": "PyTorch", "onnx": "ONNX Runtime"}
SHOWN_LAYERS = 8


@dataclass(frozen=True)
class Options:
    """Options of ``measure.py``."""

    model: Positional[Path]
    """Finished run, a generator's .safetensors file with its recipe, or an architecture such as unet_256."""
    network: str = "generator"
    """Which generator of a run with both directions: generator_A or generator_B."""
    macs: tuple[float, ...] = (0.25, 0.1)
    """For an architecture: uniform plans that keep these shares of its MACs."""
    base_width: int = 64
    """For an architecture: channels of its first layer (ngf)."""
    multiple: int = 0
    """For an architecture: widths are multiples of it; 0: what fits its base width."""
    size: int = 0
    """Height and width of the image; 0: that of the training, 256 for an architecture."""
    threads: tuple[int, ...] = ()
    """Thread counts; without it 1 and all cores."""
    rounds: int = 15
    """Visits to each network, in changing order."""
    runs: int = 2
    """Runs that count at each visit."""
    layers: bool = False
    """Also say which layers the time goes to, and which are slower than the MACs promise."""
    memory: bool = True
    """Measure peak memory, in processes of their own."""
    output: Path | None = None
    """New JSON file; a CSV file of the same name goes beside it. A run gets measured.json without it."""


@dataclass(frozen=True)
class Row:
    """One network under one engine on some threads.

    Attributes:
        network: ``dense`` or the name of a plan.
        engine: ``torch`` or ``onnx``.
        threads: ≥ 1.
        macs, params: multiply-accumulates for the image, parameters.
        published_macs: MACs as papers count them, transposed convolutions at their output.
        file_mb: weights as float32, in the engine's own file.
        peak_mb: memory to load that file and translate an image; None where it is not known.
        median_ms, low_ms, high_ms: wall clock: median and quartiles.
        cpu_ms: median time of the processor, over all threads.
        speedup: against the dense network: median ratio of runs of one round, by the processor's clock on one
            thread, by the wall clock on more.
        promised: what the MACs promise: dense MACs / MACs.
    """

    network: str
    engine: str
    threads: int
    macs: int
    params: int
    published_macs: int
    file_mb: float
    peak_mb: float | None
    median_ms: float
    low_ms: float
    high_ms: float
    cpu_ms: float
    speedup: float
    promised: float


def main(options: Options) -> None:
    """Measure, print, write."""
    check(options)
    networks, image, output = subjects(options)
    if output is not None:
        for path in (output, output.with_suffix(".csv")):
            cli.check_new_file(path)
    console = Console()
    rows = measure(networks, image, options)
    table(rows, console)
    machine = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "image": list(image.shape),
        "rounds": options.rounds,
        "runs": options.runs,
    }
    losses = {}
    if options.layers:
        for name in list(networks)[1:]:
            losses[name] = layer_losses(networks[DENSE], networks[name], image, options.rounds)
            layer_table(name, losses[name], console)
    if output is not None:
        write_json(output, plain({**machine, "rows": [asdict(row) for row in rows], "layers": losses}))
        write_text(output.with_suffix(".csv"), as_csv(rows))
        console.print(f"{output}, {output.with_suffix('.csv')}", highlight=False, soft_wrap=True)


def check(options: Options) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: with what is allowed.
    """
    check_least(options, rounds=1, runs=1, size=0, multiple=0, base_width=1)
    if any(thread < 1 for thread in options.threads):
        raise UserError(f"--threads is {list(options.threads)}; each must be 1 or more")
    if not options.macs or not all(0 < share < 1 for share in options.macs):
        raise UserError(f"--macs is {list(options.macs)}; each share must lie between 0 and 1")
    if options.output is not None and options.output.suffix == ".csv":
        raise UserError(f"--output is {options.output}; name a JSON file: the CSV file goes beside it")


def check_size(network: nn.Module, architecture: Architecture, image: Tensor) -> None:
    """Refuse an image that the dense network cannot take.

    Raises:
        UserError: with the sizes that it takes.
    """
    sides = " × ".join(map(str, image.shape[:1:-1]))
    multiple = architecture.size_multiple
    if any(side % multiple for side in image.shape[-2:]):
        raise UserError(
            f"{architecture.name} takes images whose sides are multiples of {multiple} pixels, and this "
            f"would be {sides}; choose another --size"
        )
    try:
        with torch.no_grad():
            network(image)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{architecture.name} does not run on an image of {sides} pixels ({brief(error)}); choose a "
            "larger --size"
        ) from error


def subjects(options: Options) -> tuple[dict[str, nn.Module], Tensor, Path | None]:
    """The networks, dense first; an image (1, C, H, W); where the figures go.

    The dense network has random weights: time does not depend on them.

    Raises:
        UserError: neither a run nor a generator's file nor an architecture.
    """
    output, dense = options.output, None
    if options.model.is_dir():
        run = open_run(options.model)
        files = {"pruned": run.result(options.network), "uniform": run.weights(options.network, "uniform")}
        way = options.network.removeprefix("generator")
        output = output or run.path / f"measured{way}.json"
        dense = own_architecture(run, way.removeprefix("_"))
    elif options.model.exists() or options.model.suffix:
        files = {"pruned": options.model}
    else:
        return *uniform_slices(options), output
    loaded = {name: load_network(path) for name, path in files.items() if path.exists() or name == "pruned"}
    _, architecture, recipe = loaded["pruned"]
    if not architecture.is_generator:
        raise UserError(f"{options.model} holds the discriminator {architecture.name!r}; name a generator")
    height = options.size or int(recipe.get("image_size", 256))
    width = options.size or int(recipe.get("image_width", height))
    image = random_image(architecture.in_channels, height, width)
    whole = (dense or replace(architecture, widths=None)).build().eval()
    check_size(whole, architecture, image)
    return {DENSE: whole, **{name: network for name, (network, *_) in loaded.items()}}, image, output


def own_architecture(run: RunFolder, way: str) -> Architecture | None:
    """The dense generator of a run, where it is the user's: one that was pruned before has its own widths."""
    folder = find_task_folder(task_of(run))
    path = None if folder is None else folder / way / "generator.safetensors"
    if path is None or not path.is_file():
        return None
    return Architecture.from_dict(read_recipe(path)["architecture"])


def uniform_slices(options: Options) -> tuple[dict[str, nn.Module], Tensor]:
    """An architecture with random weights, and its uniform plans.

    Raises:
        UserError: unknown name.
    """
    name = str(options.model)
    norm = "instance" if name.startswith("resnet") else "batch"
    architecture = Architecture(name, base_width=options.base_width, norm=norm)  # type: ignore[arg-type]
    if not architecture.is_generator:
        raise UserError(
            f"{name} is no run, no weight file and no generator's architecture; known are "
            f"{', '.join(GENERATORS)}"
        )
    side = options.size or 256
    image = random_image(3, side, side)
    dense = initialise(architecture.build(), torch.Generator().manual_seed(0)).eval()
    check_size(dense, architecture, image)
    groups = find_groups(dense, [image])
    prunable = PrunableNetwork(
        kind="generator",
        groups=groups,
        multiple=options.multiple or usual_multiple(architecture),
        cost=build_cost_model(dense, groups, [image]),
        cost_kind="macs",
        importance=(),
    )
    slicer, tensors = Slicer(dense, groups), dense.state_dict()
    slices = {
        f"uniform {share:g}": slicer.network(tensors, uniform_widths(prunable, share).tolist())
        for share in options.macs
    }
    return {DENSE: dense, **slices}, image


def random_image(channels: int, height: int, width: int) -> Tensor:
    """(1, channels, height, width) in [-1, 1]."""
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def measure(networks: Mapping[str, nn.Module], image: Tensor, options: Options) -> list[Row]:
    """Every network under both engines on every number of threads, all in turns."""
    for network in networks.values():
        network.requires_grad_(False)
    models = {name: write_onnx(network, image) for name, network in networks.items()}
    sizes, peaks = files_of(networks, models, tuple(image.shape), options.memory)
    macs = {name: count(network, [image]) for name, network in networks.items()}
    published = {name: published_macs(network, [image]) for name, network in networks.items()}
    rows = []
    for threads in options.threads or sorted({1, os.cpu_count() or 1}):
        modules: dict[tuple[str, str], nn.Module] = {(name, "torch"): networks[name] for name in networks}
        modules |= {(name, "onnx"): OnnxNetwork(model, threads) for name, model in models.items()}
        jobs = [Job(lambda module=module: module, (image,)) for module in modules.values()]  # type: ignore[misc]
        readings = dict(
            zip(
                modules,
                take_turns(jobs, read_clocks, options.rounds, options.runs, seed=0, on_threads=threads),
                strict=True,
            )
        )
        for (name, engine), mine in readings.items():
            timing = Timing.of(mine)
            rows.append(
                Row(
                    name,
                    engine,
                    threads,
                    *macs[name],
                    published[name],
                    round(sizes[name, engine] / 1e6, 3),
                    peaks[name, engine],
                    **{key: round(value, 4) for key, value in asdict(timing).items()},
                    speedup=round(faster(readings[DENSE, engine], mine, threads), 3),
                    promised=round(macs[DENSE][0] / macs[name][0], 3),
                )
            )
    return rows


def faster(dense: Sequence[Clocks], mine: Sequence[Clocks], threads: int) -> float:
    """By the clock that a busy machine disturbs least."""
    clock = "cpu_ms" if threads == 1 else "wall_ms"
    return speedup([getattr(one, clock) for one in dense], [getattr(one, clock) for one in mine])


def files_of(
    networks: Mapping[str, nn.Module], models: Mapping[str, bytes], shape: tuple[int, ...], memory: bool
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], float | None]]:
    """(network, engine) → bytes of the file, and megabytes at the peak of a process that runs it."""
    sizes: dict[tuple[str, str], int] = {}
    jobs: dict[tuple[str, str], MemoryJob] = {}
    small, seen = nn.Conv2d(shape[1], 8, 3, padding=1).eval(), (1, shape[1], 8, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = save_both(folder, "small", small, write_onnx(small, torch.zeros(seen)), seen)
        for number, (network, module) in enumerate(networks.items()):
            weights = save_tensors(folder / "weights.safetensors", module.state_dict())
            sizes[network, "torch"], sizes[network, "onnx"] = weights.stat().st_size, len(models[network])
            saved = save_both(folder, str(number), module, models[network], shape)
            jobs |= {(network, engine): job for engine, job in saved.items()}
        found = peaks_mb(list(jobs.values()), list(tiny.values())) if memory else [None] * len(jobs)
    peaks = [None if peak is None else round(peak, 1) for peak in found]
    return sizes, dict(zip(jobs, peaks, strict=True))


def save_both(
    folder: Path, name: str, module: nn.Module, model: bytes, shape: tuple[int, ...]
) -> dict[str, MemoryJob]:
    """Engine → what it runs to have its memory measured."""
    data = io.BytesIO()
    torch.save(module, data)
    files = {
        "torch": write_bytes(folder / f"{name}.pt", data.getvalue()),
        "onnx": write_bytes(folder / f"{name}.onnx", model),
    }
    return {engine: MemoryJob(engine, str(path), shape) for engine, path in files.items()}


def table(rows: Sequence[Row], console: Console) -> None:
    """One column a network, one line a figure."""
    names = list(dict.fromkeys(row.network for row in rows))
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("one image")
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    first = {row.network: row for row in reversed(rows)}

    def line(label: str, cells: Sequence[str]) -> None:
        shown.add_row(label, *cells)

    line("MACs, M", [f"{first[name].macs / 1e6:.1f}" for name in names])
    line("MACs as published, M", [f"{first[name].published_macs / 1e6:.1f}" for name in names])
    line("parameters, M", [f"{first[name].params / 1e6:.3f}" for name in names])
    line("MACs promise", [f"{first[name].promised:.2f}×" for name in names])
    for engine, label in ENGINES.items():
        mine = {(row.network, row.threads): row for row in rows if row.engine == engine}
        threads = sorted({row.threads for row in rows})
        one = [mine[name, threads[0]] for name in names]
        line(f"{label}: file, MB", [f"{row.file_mb:.2f}" for row in one])
        if any(row.peak_mb is not None for row in one):
            line("  peak memory, MB", ["?" if row.peak_mb is None else f"{row.peak_mb:.0f}" for row in one])
        for thread in threads:
            cells = [mine[name, thread] for name in names]
            line(f"  {thread} thread{'s' * (thread > 1)}, ms", [f"{row.median_ms:.2f}" for row in cells])
            line("    quartiles", [f"{row.low_ms:.2f} to {row.high_ms:.2f}" for row in cells])
            line("    processor, ms", [f"{row.cpu_ms:.2f}" for row in cells])
            line("    faster", [f"{row.speedup:.2f}×" for row in cells])
    console.print(shown)
    console.print(
        "Medians of runs in turns. Faster: on one thread by the processor's time, which a busy machine "
        "disturbs least; on more by the wall clock.",
        highlight=False,
        soft_wrap=True,
    )


def as_csv(rows: Sequence[Row]) -> str:
    """One line a row, the fields' names on top."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


@dataclass(frozen=True)
class Layer:
    """One convolution with the padding before and the norm and activation behind it, alone in ONNX Runtime.

    Attributes:
        layer: name of the convolution.
        kind: its type and what runs with it.
        dense_ms, pruned_ms: processor's time on one thread.
        faster: dense / pruned.
        promised: what its own MACs promise.
        lost_ms: how much longer it takes than the dense layer's time divided by what the MACs of the whole
            network promise.
    """

    layer: str
    kind: str
    dense_ms: float
    pruned_ms: float
    faster: float
    promised: float
    lost_ms: float


def layer_losses(dense: nn.Module, pruned: nn.Module, image: Tensor, rounds: int) -> list[Layer]:
    """Every layer of both networks, timed in turns; those that lose most come first."""
    share = count(pruned, [image])[0] / count(dense, [image])[0]
    both = [layer_units(network, (), [image], 1) for network in (dense, pruned)]
    jobs, macs = [], []
    for unit in itertools.chain(*both):
        parts, seen = nn.Sequential(*unit.parts), torch.zeros(1, *unit.shape)
        written = OnnxNetwork(write_onnx(parts, seen))
        jobs.append(Job(lambda written=written: written, (seen,)))  # type: ignore[misc]
        macs.append(count(parts, [seen])[0])
    readings = take_turns(jobs, read_clocks, rounds, 1, seed=0)
    times = [statistics.median(reading.cpu_ms for reading in row) for row in readings]
    half = len(both[0])
    layers = [
        Layer(
            layer=unit.name,
            kind=" ".join(type(part).__name__ for part in unit.parts),
            dense_ms=round(slow, 4),
            pruned_ms=round(fast, 4),
            faster=round(slow / max(fast, 1e-6), 3),
            promised=round(many / few, 3),
            lost_ms=round(fast - share * slow, 4),
        )
        for unit, slow, fast, many, few in zip(
            both[0], times[:half], times[half:], macs[:half], macs[half:], strict=True
        )
    ]
    return sorted(layers, key=lambda layer: -layer.lost_ms)


def layer_table(name: str, layers: Sequence[Layer], console: Console) -> None:
    """The layers that lose most, and the sum of all."""
    title = (
        f"{name}: layers that are slower than the MACs of the whole network promise (ONNX Runtime, 1 thread)"
    )
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("layer")
    for heading in ("dense, ms", "pruned, ms", "faster", "by its MACs", "lost, ms"):
        shown.add_column(heading, justify="right")

    def line(label: str, dense: float, pruned: float, promised: str, lost: float) -> None:
        faster = dense / max(pruned, 1e-6)
        shown.add_row(label, f"{dense:.2f}", f"{pruned:.2f}", f"{faster:.2f}×", promised, f"{lost:.2f}")

    for layer in layers[:SHOWN_LAYERS]:
        line(layer.layer, layer.dense_ms, layer.pruned_ms, f"{layer.promised:.2f}×", layer.lost_ms)
    shown.add_section()
    sums = [
        math.fsum(getattr(layer, key) for layer in layers) for key in ("dense_ms", "pruned_ms", "lost_ms")
    ]
    line(f"all {len(layers)}", sums[0], sums[1], "", sums[2])
    console.print(shown)


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
