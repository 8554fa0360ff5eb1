from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from envs.budget import keep_ratio, unused_share
from experiments.build import prunable
from experiments.candidates import draw_plans, found_plan, found_plans, smooth_proportions
from experiments.runs import RunFolder
from gan.errors import UserError
from gan.evaluations import PrunableNetwork
from gan.plans import Plan
from gan.tasks import load_task

BUDGETS = {"generator": 0.1, "discriminator": 0.5}
Runs = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def networks() -> dict[str, PrunableNetwork]:
    return prunable(load_task("edges2emoji"))


def test_smooth_profiles_are_smooth_and_go_both_ways() -> None:
    random = np.random.default_rng(0)
    logs = np.log([smooth_proportions(11, random, 0.5) for _ in range(200)])
    np.testing.assert_allclose(logs.std(1), 0.5)
    turns = (np.diff(np.sign(np.diff(logs)), axis=1) != 0).sum(1)
    assert turns.max() <= 2  # three half waves have two turning points inside
    middle = logs[:, 3:8].mean(1) - logs[:, [0, 1, 9, 10]].mean(1)
    assert (middle > 0.5).sum() > 20  # wide middle
    assert (middle < -0.5).sum() > 20  # narrow middle
    np.testing.assert_array_equal(smooth_proportions(1, random, 0.5), [1.0])


def test_plans_are_different_and_cost_the_same(networks: dict[str, PrunableNetwork]) -> None:
    plans = draw_plans(networks, BUDGETS, 20, np.random.default_rng(0), "l1")
    assert len({named.plan for named in plans}) == len({named.label for named in plans}) == 20
    assert [named.kind for named in plans] == ["uniform", *(["iid", "smooth"] * 10)[:19]]
    uniform = plans[0].plan
    for agent, network in networks.items():
        for named in plans:
            widths = np.array(named.plan[agent])
            assert keep_ratio(network, widths) <= BUDGETS[agent]
            assert unused_share(network, widths, BUDGETS[agent]) < 0.06
    kept = [named.plan["discriminator"] == uniform["discriminator"] for named in plans]
    assert [number for number, same in enumerate(kept) if not same] == [3, 6, 9, 12, 15, 18]
    again = draw_plans(networks, BUDGETS, 20, np.random.default_rng(0), "l1")
    assert again == plans
    assert draw_plans(networks, BUDGETS, 20, np.random.default_rng(1), "l1") != plans


def test_a_budget_that_admits_few_plans_is_refused(networks: dict[str, PrunableNetwork]) -> None:
    with pytest.raises(UserError, match="only 1 different plans were found at this budget, not 5"):
        draw_plans(networks, {"generator": 1.0, "discriminator": 1.0}, 5, np.random.default_rng(0), "l1")


def write_best(folder: RunFolder, plan: Plan, **budgets: float) -> None:
    best: dict[str, Any] = {**plan.to_dict(), "budgets": {**BUDGETS, **budgets}}
    folder.plan.write_text(json.dumps({"best": best}))


def test_the_best_plan_of_a_run(make_run: Runs, networks: dict[str, PrunableNetwork]) -> None:
    plan = draw_plans(networks, BUDGETS, 2, np.random.default_rng(0), "l1")[1].plan
    folder = make_run()
    with pytest.raises(UserError, match=r"has no plan\.json yet"):
        found_plan(folder.path, "edges2emoji", networks, BUDGETS)
    write_best(folder, plan)
    named = found_plan(folder.path, "edges2emoji", networks, BUDGETS)
    assert (named.plan, named.kind, named.label) == (plan, "found", f"found:{folder.path.name}")
    with pytest.raises(UserError, match="is of task 'edges2emoji'; this study is of 'horses'"):
        found_plan(folder.path, "horses", networks, BUDGETS)
    write_best(folder, plan, generator=0.25)
    with pytest.raises(UserError, match=r"budget generator 0\.25, discriminator 0\.5; this study is for"):
        found_plan(folder.path, "edges2emoji", networks, BUDGETS)
    write_best(folder, plan.replace("generator", networks["generator"].channels.tolist()))
    with pytest.raises(UserError, match="does not fit task 'edges2emoji': the plan keeps 1"):
        found_plan(folder.path, "edges2emoji", networks, BUDGETS)
    for damaged in ("{}", "[]", '{"best": 3}'):
        folder.plan.write_text(damaged)
        with pytest.raises(UserError, match="holds no best plan"):
            found_plan(folder.path, "edges2emoji", networks, BUDGETS)


def test_several_runs_are_told_apart_by_name(
    make_run: Runs, networks: dict[str, PrunableNetwork], tmp_path: Path
) -> None:
    plans = [each.plan for each in draw_plans(networks, BUDGETS, 2, np.random.default_rng(0), "l1")]
    folders = [make_run(), make_run()]
    for folder, plan in zip(folders, plans, strict=True):
        write_best(folder, plan)
    paths = [folder.path for folder in folders]
    found = found_plans(paths, "edges2emoji", networks, BUDGETS)
    assert found == {f"found:{path.name}": plan for path, plan in zip(paths, plans, strict=True)}
    again = tmp_path / "elsewhere" / paths[0].name
    copytree(paths[0], again)
    with pytest.raises(UserError, match="two runs of one name"):
        found_plans([paths[0], again], "edges2emoji", networks, BUDGETS)


def test_what_is_no_run_is_refused(tmp_path: Path, networks: dict[str, PrunableNetwork]) -> None:
    with pytest.raises(UserError, match="does not exist"):
        found_plan(tmp_path / "nowhere", "edges2emoji", networks, BUDGETS)
