from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from agents.registry import build_agent
from envs.budget import Budget
from envs.pruning_env import PruningEnv
from envs.toy import toy_env
from experiments import train_agents
from experiments.runs import RunFolder, create_run, describe_run, plain, read_json, read_options
from experiments.searching import Incumbent, find, learn, propose, write_plans
from experiments.transfer import adopt, begin, find_policy, reached, read_target, write_transfer
from gan.errors import UserError
from gan.files import write_json

OPTIONS = train_agents.Options(task="toy", evaluations=24, warm_up=0, reward="step")


def searched(
    path: Path, evaluations: int = 24, source: Path | None = None, **about: object
) -> tuple[RunFolder, PruningEnv, list[Incumbent]]:
    """A run on the toy problem, with or without a source."""
    folder = create_run("toy", "mappo", 0, path)
    if source is not None:
        adopt(find_policy(source, "mappo"), folder)
        about = {"transfer": {"source": source, "reference": None}, **about}
    describe_run(folder, OPTIONS, **about)
    env, agent = toy_env(evaluations, "step"), build_agent("mappo")
    env.prepare()
    zero_shot = begin(agent, env, folder)
    assert (zero_shot is None) == (source is None)
    found = learn(env, agent, folder)
    plans = find(env, agent)
    if zero_shot is not None:
        plans["zero_shot"] = zero_shot
        write_transfer(folder, zero_shot, found)
    write_plans(folder, plans)
    return folder, env, found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return searched(tmp_path_factory.mktemp("source") / "run", 160)[0]


def test_a_policy_is_worth_something_before_any_learning(source: RunFolder, tmp_path: Path) -> None:
    folder, _, _ = searched(tmp_path / "run", source=source.path)
    zero_shot = read_json(folder.transfer)["zero_shot"]
    assert zero_shot > 0.3
    plans = read_json(folder.plan)
    assert plans["zero_shot"]["potential"] == zero_shot
    # the source's own last plan, made again from its files
    assert plans["zero_shot"]["widths"] == read_json(source.plan)["proposed"]["widths"]


def test_the_zero_shot_plan_costs_no_evaluation(source: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    adopt(source.policy, folder)
    env, agent = toy_env(8, "step"), build_agent("mappo")
    env.prepare()
    assert begin(agent, env, folder) is not None
    assert (env.scorer.evaluations, env.scorer.requests) == (0, 0)


def test_a_policy_fits_other_sizes_and_ranges(source: RunFolder) -> None:
    agent = build_agent("mappo")
    agent.load(source.policy)
    env = toy_env(8, "step", budgets={"generator": Budget(0.1, 0.4)}, multiple=2)
    env.prepare()
    lowest = propose(env, agent)
    assert lowest.budgets["generator"] == 0.1
    assert propose(env, agent, {**lowest.budgets, "generator": 0.4}).plan != lowest.plan


def test_a_resumed_run_needs_its_source_no_more(source: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(source.path, tmp_path / "source")
    folder, _, _ = searched(tmp_path / "run", source=tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    env, agent = toy_env(24, "step"), build_agent("mappo")
    env.prepare()
    zero_shot = begin(agent, env, folder)
    assert zero_shot is not None
    again = learn(env, agent, RunFolder(tmp_path))
    assert env.best is not None
    assert read_json(folder.plan)["best"]["widths"] == env.best.plan.to_dict()["widths"]
    assert again[-1].evaluation is env.best


def test_evaluations_until_a_score(source: RunFolder, tmp_path: Path) -> None:
    _, env, found = searched(tmp_path / "run", source=source.path)
    agent = build_agent("mappo")
    agent.load(source.policy)
    zero_shot = propose(env, agent)
    assert reached(zero_shot, found, zero_shot.potential) == 1
    low = replace(zero_shot, potential=0.0)
    last = found[-1]
    assert reached(low, found, last.evaluation.potential) == last.evaluations + 1
    assert reached(low, found, last.evaluation.potential + 1e-9) is None


def test_evaluations_saved(source: RunFolder, tmp_path: Path) -> None:
    target = read_target(source.path, plain(OPTIONS))
    best = read_json(source.plan)["best"]["potential"]
    assert target.score == best
    assert 0 < target.evaluations <= 160
    low = target._replace(score=1e-3)
    reference = {"transfer": {"source": source.path, "reference": low}}
    folder, _, _ = searched(tmp_path / "run", source=source.path, **reference)
    content = read_json(folder.transfer)
    assert content["evaluations"] == 1  # zero-shot
    assert content["evaluations_saved"] == target.evaluations - 1


def test_a_run_of_a_comparison_is_a_reference(source: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(source.path, tmp_path / "mappo-s0"))
    options = read_json(folder.options)
    del options["warm_up"]
    write_json(folder.options, {**options, "budget": "generator=0.1,discriminator=0.5"})
    asked = {**plain(OPTIONS), "budget": "0.1"}
    assert read_target(folder.path, asked).score == read_target(source.path, plain(OPTIONS)).score
    with pytest.raises(UserError, match=r"it differs in --warm-up"):
        read_target(folder.path, {**asked, "warm_up": 100})
    folder.elastic.write_bytes(b"weights of its own")
    with pytest.raises(UserError, match=r"it differs in --warm-up"):
        read_target(folder.path, asked)


def test_references_must_have_searched_the_same(source: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"differs in --budget, --reward"):
        read_target(source.path, plain(replace(OPTIONS, budget="0.2", reward="final")))
    with pytest.raises(UserError, match=r"is a range"):
        read_target(source.path, plain(replace(OPTIONS, budget="0.1:0.2")))
    begun, _, _ = searched(tmp_path / "run", source=source.path)
    with pytest.raises(UserError, match=r"began with another run's policy itself"):
        read_target(begun.path, plain(OPTIONS))


def test_sources_that_cannot_be_used_are_refused(source: RunFolder, tmp_path: Path) -> None:
    assert find_policy(source.path, "mappo") == find_policy(source.policy, "mappo") == source.policy.resolve()
    with pytest.raises(UserError, match=r"holds a policy of mappo, not of ippo; add --algo mappo"):
        find_policy(source.path, "ippo")
    build_agent("evolution").save(tmp_path / "evolution")
    with pytest.raises(UserError, match=r"made by evolution, which learns no policy that fits other"):
        find_policy(tmp_path / "evolution", "mappo")
    with pytest.raises(UserError, match=r"use --algo mappo or ippo"):
        find_policy(source.path, "cma-es")
    shutil.copytree(source.path, tmp_path / "run")
    (tmp_path / "run" / "policy" / "agent.json").unlink()
    with pytest.raises(UserError, match=r"holds no policy"):
        find_policy(tmp_path / "run", "mappo")
    with pytest.raises(UserError, match=r"does not exist"):
        find_policy(tmp_path / "nothing", "mappo")
    (tmp_path / "run" / "options.json").write_text('{"seeds": 3}')
    with pytest.raises(UserError, match=r"is the folder of a study, not of a run"):
        find_policy(tmp_path / "run", "mappo")


def test_the_main_job_copies_the_policy_and_names_its_source(
    source: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.path.parent)
    asked = train_agents.Options(quick=True, from_=Path("run"), output=tmp_path / "run")
    options, folder = train_agents.open_folder(asked)
    assert options.from_ == source.path.resolve()
    assert read_options(folder, train_agents.Options) == options
    assert sorted(path.name for path in folder.source.iterdir()) == ["agent.json", "policy.safetensors"]
    assert read_json(folder.about)["transfer"] == {"source": str(source.path.resolve()), "reference": None}
    with pytest.raises(UserError, match=r"leave out --from"):
        train_agents.open_folder(train_agents.Options(resume=folder.path, from_=source.path))
    with pytest.raises(UserError, match=r"--reference says what --from saves"):
        train_agents.open_folder(train_agents.Options(reference=source.path))
