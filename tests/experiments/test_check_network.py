from __future__ import annotations

import pytest

from experiments import cli
from experiments.check_network import Options, main
from gan.errors import UserError

FOREIGN = "tests.gan.foreign"


def test_a_network_that_can_be_pruned_is_shown(capsys):
    arguments = [f"{FOREIGN}:StarGenerator", "--input", "3x32x32", "5"]
    cli.run(main, Options, "", arguments=arguments)
    printed = capsys.readouterr().out
    assert "StarGenerator for 3x32x32, 5" in printed
    assert "all of it can be pruned as planned" in printed
    assert "main.17" in printed
    assert "NO" not in printed


def test_the_discriminator_is_checked_at_the_generators_size(capsys):
    main(
        Options(
            f"{FOREIGN}:GroupNormGenerator",
            discriminator=f"{FOREIGN}:StridedCritic",
            input=("3x32x32",),
            multiple=4,
        )
    )
    printed = capsys.readouterr().out
    assert "StridedCritic for 6x32x32" in printed
    assert "a GroupNorm of 2 groups" in printed


def test_a_network_that_cannot_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(main, Options, "", arguments=["tests.gan.test_conformance:Twice", "--input", "3x16x16"])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "NO" in captured.out
    assert "tests.gan.test_conformance:Twice cannot be pruned as planned" in captured.err


def test_nothing_to_cut_is_no_success():
    with pytest.raises(UserError, match="cannot be pruned as planned"):
        main(Options("tests.gan.test_factories:says_network"))


def test_wrong_options():
    with pytest.raises(UserError, match="--multiple is 0"):
        main(Options(f"{FOREIGN}:StarGenerator", multiple=0))
