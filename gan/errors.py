"""The one exception that is a sentence to the user, not a defect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: the message says what came, what is allowed and what to do. Exit code 2."""


class Diverged(UserError):
    """A training whose loss is no longer finite. It would end so again with the same options and seed."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that no registry has, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {what} {name!r}; known are {', '.join(known)}{hint}")
