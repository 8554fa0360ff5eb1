from __future__ import annotations

import pytest

from gan.errors import UserError, unknown


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="wrong"):
        raise UserError("wrong")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    error = unknown("start", "elastik", ("elastic", "dense"))
    assert isinstance(error, UserError)
    assert str(error) == "unknown start 'elastik'; known are dense, elastic; did you mean 'elastic'?"


def test_a_name_like_none_of_them_gets_no_hint():
    assert (
        str(unknown("start", "zzz", ("elastic", "dense"))) == "unknown start 'zzz'; known are dense, elastic"
    )


def test_the_names_of_a_registry_will_do():
    assert "known are a, b" in str(unknown("letter", "q", {"b": 1, "a": 2}))
