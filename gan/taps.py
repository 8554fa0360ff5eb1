"""What layers inside a network say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn


@contextmanager
def recorded(network: nn.Module, taps: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within it, a forward pass leaves the outputs of the named modules in the dict."""
    found: dict[str, Tensor] = {}

    def note(name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        found[name] = output

    hooks = [network.get_submodule(name).register_forward_hook(partial(note, name)) for name in taps]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
