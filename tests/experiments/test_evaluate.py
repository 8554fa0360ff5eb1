from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import cli, evaluate


def call(*arguments: str) -> None:
    cli.run(evaluate.main, evaluate.Options, "", (), arguments)


@pytest.mark.slow
def test_elastic_slices_are_near_the_dense_outputs_and_raw_ones_are_not(tmp_path: Path) -> None:
    """What the warm-up is for, on images that it has not seen."""
    call("--budgets", "0.25", "0.1", "--output", str(tmp_path / "elastic.json"))
    call("--budgets", "0.25", "0.1", "--start", "dense", "--output", str(tmp_path / "dense.json"))
    elastic, dense = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("elastic", "dense"))
    assert elastic["0.25"]["l1_to_dense"] < 0.16
    assert elastic["0.1"]["l1_to_dense"] < 0.19
    for share in ("0.25", "0.1"):
        assert dense[share]["l1_to_dense"] > 2 * elastic[share]["l1_to_dense"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--budgets", "0"], "got 0"), (["--budgets", "0.00001"], "reach"), (["--output", "."], "exists")],
)
def test_bad_input_is_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
