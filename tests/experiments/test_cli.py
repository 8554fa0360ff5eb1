from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from experiments import cli
from gan.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Inner:
    density: float = 0.1


@dataclass(frozen=True)
class Options:
    """Some options."""

    seed: int = 0
    quick: bool = False
    weights: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError("the seed is negative; take 0 or more")


def raising(error: BaseException) -> Callable[[Options], None]:
    def main(_options: Options) -> None:
        raise error

    return main


def test_nested_options_reach_main() -> None:
    seen: list[Options] = []
    cli.run(seen.append, Options, "x", arguments=["--weights.density", "0.5", "--quick"])
    assert seen == [Options(quick=True, weights=Inner(0.5))]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("the cat is on the keyboard; lift it"), 2, "error: the cat is on the keyboard; lift it\n"),
        (KeyboardInterrupt(), 130, "\nstopped by Ctrl-C; what is written so far stays\n"),
        (KeyboardInterrupt("stopped; go on with --resume x"), 130, "\nstopped; go on with --resume x\n"),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(raising(error), Options, "x", arguments=[])
    assert exit_info.value.code == code
    assert capsys.readouterr().err == message


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"):
        cli.run(raising(ValueError("a bug")), Options, "x", arguments=[])


def test_options_that_refuse_themselves_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(raising(AssertionError()), Options, "x", arguments=["--seed", "-1"])
    assert exit_info.value.code == 2
    assert "the seed is negative" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt, match=r"epochs are kept; .* experiments/sweep\.py --resume .*mine"),
        cli.resumable("sweep", tmp_path / "mine", "whole epochs are kept"),
    ):
        raise KeyboardInterrupt


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    held = (
        "import sys; from pathlib import Path; from experiments import cli\n"
        "with cli.resumable('sweep', Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match=f"another process is at work in {tmp_path}"),
            cli.resumable("sweep", tmp_path),
        ):
            raise AssertionError("two at once")
        other.kill()  # a lock that outlives its process would lock the folder for ever
    for _ in range(2):
        with cli.resumable("sweep", tmp_path):
            pass


def test_a_command_names_what_is_not_usual() -> None:
    @dataclass(frozen=True)
    class Inner:
        rate: float = 0.1
        amp: bool = False

    @dataclass(frozen=True)
    class Outer:
        output: Path = Path("out")
        keep_every: int = 10
        inner: Inner = field(default_factory=Inner)

    options = Outer(Path("/somewhere"), 5, Inner(amp=True))
    assert cli.command("make", options, Outer()) == "python experiments/make.py --keep-every 5 --inner.amp"
    assert cli.command("make", Outer(), Outer()) == "python experiments/make.py"


def test_a_reader_that_goes_away_is_no_defect() -> None:
    program = ROOT / "experiments" / "train_agents.py"
    whole = subprocess.Popen(
        [sys.executable, program, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert whole.stdout is not None
    assert whole.stderr is not None
    whole.stdout.close()  # before anything is written
    error = whole.stderr.read()
    whole.stderr.close()
    assert whole.wait() == 1
    assert error == ""
