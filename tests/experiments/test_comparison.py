from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from agents.registry import AGENTS, WITHOUT_OBSERVATIONS
from envs.rewards import Weights
from envs.toy import ToyScorer, toy_scorer
from experiments import comparison
from experiments.candidates import best_of_run
from experiments.comparison import ABLATIONS, FULL, Place, RunOptions, Searcher, Study
from experiments.comparison_report import LOOKS
from experiments.figures import MOST_SERIES
from experiments.runs import RunFolder, read_json, read_run
from gan.errors import UserError
from gan.evaluations import EvaluationLog

RUN = RunOptions(algo="random", evaluations=40)


class ToyTask:
    def __init__(self, path: Path) -> None:
        self.elastic_path = path


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of the toy problem; raw weights are another one, where nothing couples the networks."""
    weights = tmp_path / "elastic.safetensors"
    weights.write_bytes(b"weights")

    def scorer(_: Searcher, place: Place) -> ToyScorer:
        return toy_scorer(coupling=0.0 if place.start == "dense" else 0.5)

    monkeypatch.setattr(Searcher, "scorer", scorer)
    monkeypatch.setattr(Study, "task", lambda *_: ToyTask(weights))
    monkeypatch.setattr(comparison, "load_task", lambda *_: ToyTask(weights))
    study = Study(tmp_path / "study", Weights())
    study.path.mkdir()
    return study


def search(study: Study, run: RunOptions) -> tuple[RunFolder, dict]:
    searcher = Searcher(study)
    for place in {study.place(run), study.place(run, judged=True)}:
        if not study.references(place).exists():
            searcher(place)
    searcher(run)
    return study.run(run), json.loads(study.result(run).read_text())


def test_learners_that_look_the_same_everywhere_are_learners_and_the_main_ones_have_a_colour_each() -> None:
    assert set(LOOKS) <= set(AGENTS)
    assert len(set(LOOKS)) == len(LOOKS) <= 2 * MOST_SERIES
    assert {"mappo", "ippo", "ppo", "cma-es", "evolution", "random", "gradient"} <= set(LOOKS[:MOST_SERIES])


def test_variants_change_what_they_say() -> None:
    base = RunOptions()
    assert base.varied(FULL) == base
    assert base.varied("no_feedback").feedback is False
    assert base.varied("generator_only").held == ("discriminator",)
    assert base.varied("whole_discriminator").discriminator == "dense"
    without = base.varied("without_density")
    assert without.weights == Weights(density=0.0)
    assert (without.label, without.name) == ("mappo, without density", "mappo-without_density-s0")
    assert base.varied("raw_weights").start == "dense"
    assert base.varied("own_critics").algo == "ippo"
    with pytest.raises(UserError, match="did you mean 'no_feedback'"):
        base.varied("no_feedbak")


@pytest.mark.parametrize("variant", ABLATIONS)
def test_every_variant_names_fields_of_a_run(variant: str) -> None:
    changed = RunOptions().varied(variant)
    assert (changed.noticed == RunOptions().noticed) == (variant in (FULL, "final_reward"))
    assert changed.problem.evaluations == 300


@pytest.mark.parametrize("algo", WITHOUT_OBSERVATIONS)
def test_searches_of_whole_plans_notice_neither_steps_nor_feedback(study: Study, algo: str) -> None:
    run = RunOptions(algo=algo, evaluations=12)
    changed = replace(run, feedback=False, reward="step")
    assert changed != run
    assert changed.noticed == run.noticed
    if algo == "magnitude":  # the toy's channels have no importance
        return
    _, usual = search(study, run)
    study.result(run).unlink()
    study.run(run).evaluations.unlink()
    _, same = search(study, changed)
    del usual["seconds"], same["seconds"]
    assert same == usual


def test_what_learners_notice() -> None:
    for variant in ("without_density", "generator_only", "raw_weights"):
        assert RUN.varied(variant).noticed != RUN.noticed
    uniform, gradient = RunOptions(algo="uniform"), RunOptions(algo="gradient")
    assert uniform.varied("without_density").noticed == uniform.noticed
    assert uniform.varied("whole_discriminator").noticed != uniform.noticed
    assert gradient.varied("step_reward").noticed == gradient.noticed
    assert gradient.varied("no_feedback").noticed != gradient.noticed


def test_a_run_folder_explains_itself(study: Study) -> None:
    folder, result = search(study, RUN)
    run = read_run(folder.path)
    assert (run.options["algo"], run.options["variant"], run.seed) == ("random", "full", 0)
    assert run.metrics["evaluations"].iloc[-1] == 40
    _, options, best = best_of_run(folder.path)
    assert options["task"] == "edges2emoji"
    assert best["potential"] == result["score"] == result["own_score"] > 0
    assert result["curve"]["evaluations"][0] == 0
    assert result["curve"]["score"][0] == 0.0
    assert result["curve"]["score"][-1] == result["score"]
    assert sum(result["credit"]["shapley"].values()) == pytest.approx(result["score"])
    assert result["evaluations"] == 40
    assert read_json(folder.credit) == result["credit"]
    assert read_json(folder.elastic_reference)["start"] == "elastic"


def test_references_are_scored_once(study: Study) -> None:
    place = study.place(RUN)
    Searcher(study)(place)
    log = EvaluationLog(study.references(place), toy_scorer().fingerprint)
    assert len(log.scores) == 65
    assert not log.counted
    search(study, RUN)
    lines = study.run(RUN).evaluations.read_text()
    assert lines.startswith(study.references(place).read_text())


def test_the_same_search_is_not_scored_twice(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, whole = RUN.varied("generator_only"), RUN.varied("whole_discriminator")
    assert whole.twin == alone
    assert alone.twin is RUN.twin is None
    _, by_itself = search(study, whole)
    study.result(whole).unlink()
    study.run(whole).evaluations.unlink()
    folder, usual = search(study, alone)
    scored = []
    score = ToyScorer.score
    monkeypatch.setattr(ToyScorer, "score", lambda self, plan: scored.append(plan) or score(self, plan))
    _, shared = search(study, whole)
    searched = {plan.key for plan in scored}
    assert not searched & set(EvaluationLog(folder.evaluations, toy_scorer().fingerprint).scores)
    for result in (by_itself, usual, shared):
        assert result.pop("seconds") >= 0
    assert shared == by_itself == usual


def test_an_interrupted_search_is_repeated_from_its_log(study: Study) -> None:
    folder, result = search(study, RUN)
    whole = folder.evaluations.read_text().splitlines(keepends=True)
    study.result(RUN).unlink()
    folder.evaluations.write_text("".join(whole[:80]) + whole[80][:30])
    _, again = search(study, RUN)
    for name in ("seconds", "replay_left"):
        del result[name], again[name]
    assert again == result
    assert [json.loads(line)["plan"] for line in folder.evaluations.read_text().splitlines()[1:]] == [
        json.loads(line)["plan"] for line in whole[1:]
    ]


def test_ablations_are_judged_by_the_same_reward(study: Study) -> None:
    run = RUN.varied("without_fidelity")
    _, result = search(study, run)
    assert result["own_score"] != result["score"]
    weights = Weights()
    judged = sum(weights.of(term) * score for term, score in result["scores"].items())
    assert result["score"] == pytest.approx(judged)


def test_raw_weights_are_judged_by_elastic_ones(study: Study) -> None:
    run = RUN.varied("raw_weights")
    folder, result = search(study, run)
    assert study.place(run).weights == "dense"
    assert study.settings(run).weights == "dense"
    assert study.settings(RUN).weights == "elastic"
    elastic, raw = (
        EvaluationLog(folder.path / name, toy_scorer(coupling=coupling).fingerprint)
        for name, coupling in (("yardstick.jsonl", 0.5), ("evaluations.jsonl", 0.0))
    )
    assert not elastic.counted
    assert len(raw.counted) == 40
    key = json.dumps(result["plan"], separators=(",", ":"))
    assert elastic.scores[key].gaps == result["gaps"]
    assert read_json(folder.elastic_reference) == {"start": "dense"}


def test_held_discriminators_stay_uniform(study: Study) -> None:
    _, result = search(study, RUN.varied("generator_only"))
    assert result["plan"]["widths"]["discriminator"] == result["uniform"]["widths"]["discriminator"]
    assert result["plan"]["widths"]["generator"] != result["uniform"]["widths"]["generator"]
    assert result["credit"]["shapley"]["discriminator"] == pytest.approx(0.0)


def test_own_elastic_weights_lie_in_the_run(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    made = study.path / "elastic" / "edges2emoji-s0.safetensors"
    made.parent.mkdir()
    made.write_bytes(b"own")
    own = Study(study.path, study.weights, warm_up=5)
    assert own.place(RUN).weights == str(made)
    folder, _ = search(own, RUN)
    assert folder.elastic.read_bytes() == b"own"
