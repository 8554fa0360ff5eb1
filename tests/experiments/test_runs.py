from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from envs.records import Episode
from experiments import runs
from experiments.runs import (
    MetricsLog,
    RunFolder,
    check_least,
    create_run,
    describe_run,
    episode_row,
    open_run,
    plain,
    read_metrics,
    read_options,
    read_run,
    spent_evaluations,
)
from gan.errors import UserError
from tests.experiments.conftest import SomeOptions, SomeWeights, metrics_rows


def test_default_names_take_the_next_free_suffix(tmp_path: Path) -> None:
    made = [create_run("edges2emoji", "mappo", 3, root=tmp_path).path.name for _ in range(3)]
    assert made == ["edges2emoji-mappo-s3", "edges2emoji-mappo-s3-2", "edges2emoji-mappo-s3-3"]


def test_a_checkpoint_path_as_task_gives_a_plain_name(tmp_path: Path) -> None:
    folder = create_run("weights/latest_net_G.pth", "random", 0, root=tmp_path)
    assert folder.path == tmp_path / "latest_net_G-random-s0"


def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"--output .*mine exists"):
        create_run("edges2emoji", "mappo", 0, output=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_new_output_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = create_run("edges2emoji", "mappo", 0, output=tmp_path / "a" / "b")
    assert folder.path.is_dir()


def test_an_output_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        create_run("edges2emoji", "mappo", 0, output=tmp_path / "file" / "run")


def test_options_come_back_as_they_were(tmp_path: Path) -> None:
    folder = create_run("edges2emoji", "mappo", 0, root=tmp_path)
    options = SomeOptions(seed=7, output=tmp_path / "x", images=(1, 2, 3), weights=SomeWeights(density=0.5))
    describe_run(folder, options)
    assert read_options(folder, SomeOptions) == options
    about = json.loads(folder.about.read_text())
    assert about["versions"]["torch"]
    assert set(about) >= {"format", "started", "command", "commit", "python", "machine"}


def test_an_option_of_another_version_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.options.write_text(json.dumps({"task": "edges2emoji", "weights": {"shape": 1.0}}))
    with pytest.raises(UserError, match="unknown option shape"):
        read_options(folder, SomeOptions)


def test_plain_turns_values_into_json() -> None:
    value = {
        "path": Path("a"),
        "row": np.arange(2),
        "one": np.float32(0.5),
        "none": float("nan"),
        "t": (1, True),
    }
    assert plain(value) == {"path": "a", "row": [0, 1], "one": 0.5, "none": None, "t": [1, True]}
    assert json.dumps(plain(value), allow_nan=False)


def test_commit_is_none_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_arguments: object, **_options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert runs.commit() is None


def test_an_episode_makes_a_row(tmp_path: Path) -> None:
    both = {"generator": 0.9, "discriminator": 0.5}
    episode = Episode(
        episode=3,
        return_=0.25,
        term_scores={"mmd_gap": 0.5},
        term_rewards={"mmd_gap": 0.25},
        sparsity=both,
        channel_sparsity={"generator": 0.7, "discriminator": 0.3},
        budgets={"generator": 0.1, "discriminator": 0.5},
        unused={"generator": 0.0, "discriminator": 0.01},
        evaluations=30,
        requests=33,
        best_potential=None,
    )
    log = MetricsLog(tmp_path / "metrics.csv")
    log.append(episode_row(episode, seconds=1.23456))
    row = read_metrics(RunFolder(tmp_path)).iloc[0]
    assert row["episode"] == 3
    assert row["return"] == 0.25
    assert row["mmd_gap.score"] == 0.5
    assert row["generator.sparsity"] == 0.9
    assert row["discriminator.channel_sparsity"] == 0.3
    assert (row["evaluations"], row["requests"]) == (30, 33)
    assert np.isnan(row["best_potential"])
    assert row["seconds"] == 1.235


def test_rows_keep_the_columns_of_the_first(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.csv")
    log.append({"episode": 1, "return": 0.1})
    log.append({"return": 0.2, "episode": 2})  # the order of the header counts
    with pytest.raises(ValueError, match="balance"):
        log.append({"episode": 3, "return": 0.3, "balance": 1.0})
    assert (tmp_path / "metrics.csv").read_text() == "episode,return\n1,0.1\n2,0.2\n"


def test_a_torn_last_line_is_dropped_and_not_continued(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(episodes=3)
    whole = folder.metrics.read_text()
    folder.metrics.write_text(whole[:-9])
    assert read_metrics(folder)["episode"].tolist() == [1, 2]
    MetricsLog(folder.metrics).append(metrics_rows(3)[2])
    assert folder.metrics.read_text() == whole


def test_a_resumed_run_does_not_write_old_rows_again(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(episodes=5)
    before = folder.metrics.read_text()
    log = MetricsLog(folder.metrics)
    for row in metrics_rows(6):
        log.append({**row, "seconds": 0.01})  # scores come from the evaluation log: quicker this time
    after = folder.metrics.read_text()
    assert after.startswith(before)
    assert read_metrics(folder)["episode"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_that_leaves_its_road_cuts_the_old_one(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(episodes=5)
    log = MetricsLog(folder.metrics)
    rows = metrics_rows(4)
    log.append(rows[0])
    log.append({**rows[1], "return": -1.0})
    log.append(rows[2])
    assert read_metrics(folder)["episode"].tolist() == [1, 2, 3]
    assert read_metrics(folder)["return"][1] == -1.0


def test_a_learner_may_go_on_from_a_checkpoint(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(episodes=5)
    log = MetricsLog(folder.metrics)
    log.append({**metrics_rows(4)[3], "return": 9.0})
    assert read_metrics(folder)["episode"].tolist() == [1, 2, 3, 4]


def test_a_run_reads_back(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(seed=4, episodes=6)
    run = read_run(folder.path)
    assert (run.seed, run.options["algo"], len(run.metrics)) == (4, "mappo", 6)
    expected = [row["return"] for row in metrics_rows(6, seed=4)]
    np.testing.assert_allclose(run.metrics["return"], expected, rtol=1e-6)


def test_unreadable_runs_are_refused_in_one_sentence(
    tmp_path: Path, make_run: Callable[..., RunFolder]
) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run folder"):
        read_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        read_run(tmp_path / "file")
    with pytest.raises(UserError, match="no finished episode"):
        read_run(make_run(episodes=0).path)
    damaged = make_run(episodes=2)
    damaged.metrics.write_text("episode,return\n1,abc\n")
    with pytest.raises(UserError, match="damaged"):
        read_run(damaged.path)
    damaged.options.write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        read_run(damaged.path)
    damaged.options.write_text("[]")
    with pytest.raises(UserError, match=r"options\.json holds no JSON object"):
        read_run(damaged.path)


def test_an_unfinished_run_says_what_is_missing(make_run: Callable[..., RunFolder]) -> None:
    folder = open_run(make_run().path)
    folder.require(folder.metrics)
    assert not folder.finished
    with pytest.raises(UserError, match=r"no plan\.json and no generator\.safetensors yet.*--resume"):
        folder.require(folder.metrics, folder.plan, folder.weights("generator"))


def test_studies_are_no_runs(tmp_path: Path) -> None:
    describe_run(RunFolder(tmp_path), ManySeeds())
    folder = open_run(tmp_path)
    with pytest.raises(UserError, match=r"is the folder of a study, not of a run; name a run"):
        folder.require(folder.plan)
    with pytest.raises(UserError, match=r"is the folder of a study"):
        read_run(tmp_path)


def test_evaluations_of_an_episode_that_did_not_end_are_spent_too(
    make_run: Callable[..., RunFolder],
) -> None:
    folder = make_run(episodes=2)  # of ten steps
    assert spent_evaluations(folder) == 20  # a search without a log of its plans
    entries = [{"counted": False}] * 5 + [{"counted": True}] * 24
    whole = "".join(json.dumps(entry) + "\n" for entry in ({"format": 1}, *entries))
    folder.evaluations.write_text(whole + '{"counted": tr')
    assert spent_evaluations(folder) == 24
    # gradient steps are no plans
    folder.evaluations.write_text(json.dumps({"format": 1}) + '\n{"counted": true}\n')
    assert spent_evaluations(folder) == 20
    folder.evaluations.write_text("{}\nnothing\n")
    with pytest.raises(UserError, match=r"evaluations\.jsonl is damaged"):
        spent_evaluations(folder)


@dataclass(frozen=True)
class ManySeeds:
    seeds: int = 5


def test_weight_files_have_a_name_per_network_and_stage(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.weights("generator").name == "generator.safetensors"
    assert folder.weights("discriminator", "raw").name == "discriminator_raw.safetensors"


@dataclass(frozen=True)
class NewOptions(SomeOptions):
    added_later: int = 5


def test_an_option_that_a_run_does_not_know_takes_its_default(make_run: Callable[..., RunFolder]) -> None:
    assert read_options(make_run(), NewOptions).added_later == 5


@dataclass(frozen=True)
class Numbers:
    warm_up: int | None = None
    rate: float = 0.5


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_a_number_that_is_too_small_or_none_at_all_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=rf"--warm-up is {value}; it must be 0 or more"):
        check_least(Numbers(warm_up=value), warm_up=0)  # type: ignore[arg-type]


def test_numbers_that_are_large_enough_or_left_open_pass() -> None:
    check_least(Numbers(), warm_up=3, rate=0.5)
    check_least(Numbers(warm_up=3), warm_up=3)
