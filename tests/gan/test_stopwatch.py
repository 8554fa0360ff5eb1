from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gan.stopwatch import Clocks, Job, Timing, read_clocks, speedup, take_turns, threads, time_all

IMAGE = torch.zeros(1, 3, 8, 8)


def test_a_median_is_taken_over_visits_in_changing_order_on_one_thread():
    seen: list[tuple[int, int]] = []
    modules = [nn.Identity() for _ in range(6)]
    clock = iter(range(10_000))

    def timer(module: nn.Module, inputs: Sequence[Tensor]) -> float:
        index = modules.index(module)
        seen.append((index, torch.get_num_threads()))
        return 1e6 if next(clock) % 13 == 0 else float(index)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        jobs = [Job(lambda module=module: module, (IMAGE,)) for module in modules]
        times = time_all(jobs, timer, rounds=5, runs=3, seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert times.tolist() == [0, 1, 2, 3, 4, 5]
    assert {threads for _, threads in seen} == {1}
    visits = [index for index, _ in seen[::4]]
    rounds = [visits[start : start + 6] for start in range(0, 30, 6)]
    assert all(sorted(order) == list(range(6)) for order in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_readings_of_one_round_have_one_place() -> None:
    modules = [nn.Identity() for _ in range(3)]
    clock = iter(range(1000))

    def timer(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[int, int]:
        return modules.index(module), next(clock)

    jobs = [Job(lambda module=module: module, (IMAGE,)) for module in modules]
    readings = take_turns(jobs, timer, rounds=4, runs=2, seed=1)
    for index, row in enumerate(readings):
        assert [who for who, _ in row] == [index] * 8
        # A round is 3 visits of 3 runs: its readings lie in one stretch of 9 ticks.
        assert [when // 9 for _, when in row] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_waiting_counts_on_the_wall_and_not_in_the_processor() -> None:
    class Sleep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.05)
            return x

    clocks = read_clocks(Sleep(), (IMAGE,))
    assert clocks.wall_ms >= 50
    assert clocks.cpu_ms < clocks.wall_ms


def test_a_timing_by_hand() -> None:
    timing = Timing.of([Clocks(wall, wall / 2) for wall in (5.0, 1.0, 2.0, 4.0, 3.0)])
    assert (timing.median_ms, timing.low_ms, timing.high_ms, timing.cpu_ms) == (3.0, 2.0, 4.0, 1.5)


def test_a_speedup_is_the_median_of_ratios_by_round() -> None:
    # A machine that is ten times slower in one round changes nothing.
    assert speedup([4.0, 40.0, 6.0], [2.0, 20.0, 2.0]) == pytest.approx(2.0)


def test_threads_are_given_back_after_an_error() -> None:
    def broken(count: int) -> None:
        with threads(count):
            assert torch.get_num_threads() == count
            raise RuntimeError("broken")

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        broken(before + 1)
    assert torch.get_num_threads() == before
