from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from envs.budget import Budget
from experiments.build import (
    build_budgets,
    check_reachable,
    finetuning,
    finetuning_of,
    pick_device,
    prunable,
    smallest_plan,
    with_latency,
)
from gan.cyclegan import CycleOptions
from gan.data import PairedImages
from gan.errors import UserError
from gan.latency import measure_latency
from gan.tasks import AGENTS, load_task
from tests.gan.test_unpaired import make_task

CPU = torch.device("cpu")


def test_defaults_and_parsed_budgets() -> None:
    assert build_budgets("") == {"generator": Budget(0.1, 0.1), "discriminator": Budget(0.5, 0.5)}
    assert build_budgets("0.2")["generator"] == Budget(0.2, 0.2)
    assert build_budgets("0.2")["discriminator"] == Budget(0.5, 0.5)
    assert build_budgets("discriminator=0.3")["discriminator"] == Budget(0.3, 0.3)


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_the_smallest_plan_meets_the_lowest_budget(cost: str) -> None:
    task = load_task()
    budgets = build_budgets("generator=0.05:0.5,discriminator=0.25")
    networks = prunable(task, cost)
    for agent, widths in smallest_plan(task, budgets, cost).items():
        network = networks[agent]
        kept = network.cost_of(np.array(widths)) / network.cost_of(network.channels)
        assert kept <= budgets[agent].low
        assert kept > 0.8 * budgets[agent].low


def test_unreachable_budgets_are_refused_with_the_range() -> None:
    with pytest.raises(UserError, match=r"generator.*reach"):
        check_reachable(load_task(), build_budgets("0.0001"), "macs")


def test_finetuning_is_the_same_for_every_row_but_its_seed() -> None:
    assert finetuning(3, 1, CPU) == finetuning(3, 1, CPU)
    assert finetuning(3, 1, CPU).seed == 1
    assert finetuning(3, 1, CPU, seconds=9.0).seconds == 9.0


def test_finetuning_without_pairs_is_that_of_the_task_and_its_images() -> None:
    task = make_task()
    options = finetuning_of(task, 3, 1)
    assert isinstance(options, CycleOptions)
    assert (options.epochs, options.seed, options.batch_size, options.identity) == (3, 1, 4, 0.5)
    assert finetuning_of(replace(task, adversarial="hinge"), 3, 1).adversarial == "hinge"
    large, grey = (torch.zeros(1, *shape, dtype=torch.uint8) for shape in ((3, 256, 256), (1, 256, 256)))
    options = finetuning_of(replace(task, val=PairedImages(grey, large, ("a",))), 3, 1)
    assert isinstance(options, CycleOptions)
    assert (options.batch_size, options.identity) == (1, 0.0)  # no generator takes its targets as inputs


def test_devices() -> None:
    assert pick_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        assert pick_device("auto") == "cpu"
        with pytest.raises(UserError, match="no CUDA device"):
            pick_device("cuda")


def test_multiples_keep_uniform_from_leaving_more_than_random_plans() -> None:
    """Otherwise a search would win by filling the budget."""
    from envs.budget import project, random_proportions, uniform

    task, budgets = load_task(), build_budgets("")
    networks = prunable(task)
    random = np.random.default_rng(0)
    for agent in AGENTS:
        network, budget = networks[agent], budgets[agent].low
        plans = [project(network, random_proportions(network, random), budget) for _ in range(100)]
        assert uniform(network, budget).unused <= np.mean([plan.unused for plan in plans])


def weights_clock(module: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """A clock whose time is the number of weights: deterministic."""
    return 0.1 + 1e-6 * sum(parameter.numel() for parameter in module.parameters())


def test_a_budget_of_latency(tmp_path: Path) -> None:
    task = load_task()
    tables = {
        agent: measure_latency(
            task.networks[agent],
            task.groups[agent],
            [task.example(agent)],
            task.multiples[agent],
            timer=weights_clock,
            points=3,
            rounds=1,
            runs=1,
        )
        for agent in AGENTS
    }
    path = tmp_path / "latency.json"
    first = with_latency(task.with_latency(tables), path)
    again = with_latency(task, path)  # read, not measured
    budgets = build_budgets("generator=0.4,discriminator=0.6")
    check_reachable(first, budgets, "latency")
    plans = smallest_plan(first, budgets, "latency")
    assert plans == smallest_plan(again, budgets, "latency")
    assert plans != smallest_plan(task, budgets)
    for agent, network in prunable(again, "latency").items():
        kept = network.cost_of(np.array(plans[agent])) / network.cost_of(network.channels)
        assert 0.9 * budgets[agent].low < kept <= budgets[agent].low
    with pytest.raises(UserError, match=r"generator's latency .* give a budget from"):
        check_reachable(again, build_budgets("0.001"), "latency")


def test_a_damaged_latency_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text("{")
    with pytest.raises(UserError, match="is no latency table"):
        with_latency(load_task(), path)
