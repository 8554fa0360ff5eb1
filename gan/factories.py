"""Networks that users build with code of their own, named as ``module:factory``."""

from __future__ import annotations

import importlib
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gan.errors import UserError
from gan.groups import ChannelGroup, find_groups
from gan.runtime import mark_layout
from gan.slicing import Slicer
from gan.trial_cuts import brief, tried_groups


def is_factory(name: str) -> bool:
    """Whether a name means code of the user's."""
    return ":" in name


def import_here(
    module: str, what: str, otherwise: str = "start from its folder, or put it on PYTHONPATH"
) -> ModuleType:
    """A module by its name, which may also lie in the working folder.

    Args:
        module: its name, with dots.
        what: what it is called in the sentence.
        otherwise: what to do where there is none.

    Raises:
        UserError: there is none, or it does not run.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} cannot be imported ({error}); {otherwise}") from error
    except Exception as error:  # the code is anybody's
        raise UserError(f"{what} does not run ({_said(error)}); put it right") from error


def load_factory(name: str) -> Callable[[], nn.Module]:
    """What ``module:factory`` names: a class of networks, or a function that says ``-> nn.Module``.

    The module is looked for in the working folder, too. Nothing else is ever called: a recipe names its
    factory, and must not be able to name, say, ``os:abort``.

    Raises:
        UserError: nothing is there under that name, or it says of itself that it makes something else.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise UserError(f"{name!r} names no factory; write module:factory, such as my_nets:make_generator")
    found: Any = import_here(module_name, f"the module of {name!r}")
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{module_name} has no {attribute!r}; name a function or class that it has")
        found = getattr(found, part)
    made = found if isinstance(found, type) else _returned(found)
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise UserError(
            f"{name} does not say that it makes a network; name a class of networks, or write "
            f"def {attribute}() -> nn.Module"
        )
    return found  # type: ignore[no-any-return]


def _returned(function: Any) -> Any:
    try:
        return typing.get_type_hints(function).get("return")
    except (TypeError, NameError, AttributeError):
        return None


def make_network(name: str) -> nn.Module:
    """The dense network of a factory, with whatever weights it comes with, in evaluation mode.

    Raises:
        UserError: no such factory, one that needs arguments or fails, or a network that is not built yet.
    """
    factory = load_factory(name)
    try:
        network = factory()
    except TypeError as error:
        raise UserError(f"{name} must be callable without arguments ({error})") from error
    except UserError:
        raise
    except Exception as error:  # the code is anybody's
        raise UserError(f"{name} builds no network ({_said(error)}); put it right") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} returned a {type(network).__name__}; it must return a torch.nn.Module")
    lazy = [key for key, value in network.named_parameters() if isinstance(value, UninitializedParameter)]
    if lazy:
        raise UserError(
            f"{name} returned a network whose {lazy[0]!r} has no shape yet; name the channels of lazy "
            "layers, or run it once in the factory"
        )
    return network.eval()


def _said(error: Exception) -> str:
    """What went wrong, and in which line of whose code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else place[:2]
    return f"{type(error).__name__}: {brief(error)}, in {Path(str(file)).name}, line {line}"


def first_channels(network: nn.Module) -> int:
    """Input channels of the first convolution, in the order of definition.

    Raises:
        UserError: there is none.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            return module.in_channels
    raise UserError(f"{type(network).__name__} has no convolution: there is nothing to prune")


def parse_shape(text: str) -> tuple[int, ...]:
    """``3x64x64`` → (3, 64, 64); ``5`` → (5,), a vector of labels.

    Raises:
        UserError: anything else.
    """
    parts = text.lower().split("x")
    if len(parts) not in (1, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f"--input {text!r} is no shape; write CHANNELSxHEIGHTxWIDTH such as 3x64x64, or one number for a "
            "vector of labels"
        )
    return tuple(map(int, parts))


def example_inputs(shapes: Sequence[Sequence[int]], seed: int = 0) -> list[Tensor]:
    """One random image (or label vector) of each shape, (1, …), with values in about [−1, 1]."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *shape, generator=random).tanh() for shape in shapes]


@cache
def factory_widths(name: str, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Dense widths of the groups of a factory's network.

    Args:
        shape: (C, H, W) of the input that it is traced with.
    """
    return tuple(group.channels for group in _slicer(name, shape).groups)


@cache
def _slicer(name: str, shape: tuple[int, int, int]) -> Slicer:
    network = make_network(name)
    inputs = example_inputs([shape])
    groups = tried_groups(network, inputs).groups
    return Slicer(mark_layout(network, inputs), groups)


def build_network(name: str, shape: tuple[int, int, int], widths: Sequence[int] | None) -> nn.Module:
    """A factory's network, at other widths where some are given: cut out of the dense one.

    Raises:
        UserError: no such factory, or a wrong number of widths.
    """
    network = make_network(name)
    if widths is None:
        return mark_layout(network, example_inputs([shape]))
    dense = factory_widths(name, shape)
    if len(widths) != len(dense) or any(not 1 <= w <= d for w, d in zip(widths, dense, strict=True)):
        raise UserError(f"{name} takes {len(dense)} widths of at most {list(dense)}; got {list(widths)}")
    return _slicer(name, shape).network(network.state_dict(), widths)


def groups_of(name: str, network: nn.Module, inputs: Sequence[Tensor]) -> tuple[ChannelGroup, ...]:
    """The channel groups of an architecture of that name: those of a factory are tested."""
    return tried_groups(network, inputs).groups if is_factory(name) else find_groups(network, inputs)
