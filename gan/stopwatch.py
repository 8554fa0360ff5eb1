"""How long modules take, measured in turns: whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Reading = TypeVar("Reading")
Timer = Callable[[nn.Module, Sequence[Tensor]], float]
"""Milliseconds of one run of a module on its inputs."""


class Clocks(NamedTuple):
    """One run by two clocks.

    Attributes:
        wall_ms: what a user waits; a busy machine makes it longer.
        cpu_ms: what the processor works for this program, over all its threads; waiting does not count.
    """

    wall_ms: float
    cpu_ms: float


@torch.no_grad()
def read_clocks(module: nn.Module, inputs: Sequence[Tensor]) -> Clocks:
    """One run of a module, until the device is done."""
    wall, cpu = time.perf_counter(), time.process_time()
    module(*inputs)
    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize()
    return Clocks(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))


def time_once(module: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Wall milliseconds of one run, until the device is done."""
    return read_clocks(module, inputs).wall_ms


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Job:
    """Something to time: made when its turn comes, because all of them together would fill the memory.

    Attributes:
        make: gives the module in evaluation mode.
        inputs: what it runs on.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]


def take_turns(
    jobs: Sequence[Job],
    timer: Callable[[nn.Module, Sequence[Tensor]], Reading],
    rounds: int,
    runs: int,
    seed: int,
    on_threads: int = 1,
) -> list[list[Reading]]:
    """Per job ``rounds × runs`` readings; those of one round have the same place in every job's list.

    Every round visits all jobs in a new order, so that a drift of the machine falls on all alike; a visit is
    one run that does not count and ``runs`` that do.
    """
    random = np.random.default_rng(seed)
    readings: list[list[Reading]] = [[] for _ in jobs]
    with threads(on_threads):
        for _ in range(rounds):
            for index in random.permutation(len(jobs)):
                module, inputs = jobs[index].make(), jobs[index].inputs
                timer(module, inputs)
                readings[index] += [timer(module, inputs) for _ in range(runs)]
    return readings


def time_all(jobs: Sequence[Job], timer: Timer, rounds: int, runs: int, seed: int) -> NDArray[np.float64]:
    """Median milliseconds of every job, on one thread; see :func:`take_turns`."""
    return np.array([statistics.median(row) for row in take_turns(jobs, timer, rounds, runs, seed)])


@dataclass(frozen=True)
class Timing:
    """What the readings of a job say.

    Attributes:
        median_ms: wall clock.
        low_ms, high_ms: its quartiles.
        cpu_ms: median of the processor's time.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    cpu_ms: float

    @classmethod
    def of(cls, readings: Sequence[Clocks]) -> Timing:
        wall = np.array([reading.wall_ms for reading in readings])
        low, median, high = np.quantile(wall, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high, statistics.median(reading.cpu_ms for reading in readings))


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times faster: median of the ratios of readings of the same round."""
    return float(np.median(np.array(slow) / np.array(fast)))
