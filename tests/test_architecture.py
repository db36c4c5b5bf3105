"""The rules of the tree that no tool knows, read from the source with ``ast``.

Each rule is a function from one parsed module to its violations, so that the rules can be tried on
made-up modules as well.  A failure names file, line and rule.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest

TREE: Final = Path(__file__).resolve().parent.parent
FUNCTION_LINES_MAX: Final = 70

# Who may import whom: cli > roles > registry > (wire, store, ring) > swarm > (digest, errors).
# `base` is digest, errors and identity.  Beside that order stand `telemetry`, below everything that reports
# through it (the pure core does not report), `units`, below what reads sizes and times that people
# write, the configuration (`config`, `layers`), which only roles and what starts them read, `systemd`,
# which only the process as a whole talks to, `setup`,
# which writes files of other programs, and `runtime`, `status` and `storage`, which are parts of the
# command line that are no commands.
BASE: Final = frozenset({"base"})
CORE: Final = BASE | {"swarm"}
SHELL: Final = CORE | {"telemetry"}
FACE: Final = SHELL | {"wire", "store", "ring", "watched_files"}
MAY_IMPORT: Final[dict[str, frozenset[str]]] = {
    "base": frozenset(),
    "swarm": BASE,
    "sim": CORE | {"units"},
    "units": BASE,
    "patterns": frozenset(),
    "config": BASE | {"units"},
    "layers": BASE | {"units", "config", "patterns"},
    "certificates": BASE,
    "watched_files": BASE,
    "telemetry": BASE | {"config"},
    "ring": SHELL,
    "store": SHELL | {"units", "patterns"},
    "wire": SHELL | {"watched_files"},
    "registry": FACE,
    "roles": FACE | {"registry", "config", "units", "patterns", "certificates"},
    "status": BASE | {"registry", "units"},
    "storage": BASE | {"store", "units"},
    "systemd": BASE,
    "setup": BASE,
    "runtime": BASE | {"telemetry", "config", "layers", "roles", "systemd"},
    "cli": BASE
    | {"telemetry", "config", "layers", "units", "runtime", "status", "storage"}
    | {"store", "registry", "roles", "sim", "certificates", "setup"},
}
ROLES: Final = frozenset({"agent", "origin", "tracker", "index"})

# What a sans-I/O core must not reach: the outside world, and the clock.
IMPURE: Final = frozenset(
    {"trio", "socket", "os", "time", "datetime", "logging", "structlog", "secrets", "threading"}
)

# Each heavy dependency has one place that knows it, so that replacing it touches one place.
IMPORTER: Final[dict[str, str]] = {
    "bcrypt": "swarmpull/registry/htpasswd.py",
    "cryptography": "swarmpull/certificates.py",
    "click": "swarmpull/cli/",
    "hypercorn": "swarmpull/registry/server.py",
    "httpx": "swarmpull/registry/http.py",
    "blake3": "swarmpull/store/hashing.py",
    "minio": "swarmpull/store/backends/s3_client.py",
    "urllib3": "swarmpull/store/backends/s3_client.py",
    "quart": "swarmpull/registry/",
    "quart_trio": "swarmpull/registry/",
}


@attrs.frozen
class Source:
    """One parsed module.

    Attributes:
        path: relative to the tree, with forward slashes.
    """

    path: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """The dotted name of the module; that of the package for an ``__init__.py``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        """What a relative import of one dot starts from."""
        return self.name if self.path.endswith("__init__.py") else self.name.rpartition(".")[0]


@attrs.frozen
class Violation:
    path: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


Rule = Callable[[Source], Iterator[Violation]]


def imported_names(source: Source) -> Iterator[tuple[int, str]]:
    """Every imported thing as a dotted name, ``from a import b`` as ``a.b``, with its line."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = source.package.split(".")
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer_of(name: str) -> str | None:
    """The layer of a dotted name; None for what is not of this package."""
    parts = name.split(".")
    if parts[0] != "swarmpull":
        return None
    layer = parts[1] if len(parts) > 1 else "base"
    if layer in {"digest", "errors", "identity", "__version__"}:
        return "base"
    return "cli" if layer == "__main__" else layer


def imports_follow_the_direction(source: Source) -> Iterator[Violation]:
    own = layer_of(source.name)
    if own is None:
        return
    for line, name in imported_names(source):
        other = layer_of(name)
        if other in {None, own} or (own in MAY_IMPORT and other in MAY_IMPORT[own]):
            continue
        yield Violation(source.path, line, f"{own} must not import {other}: {name}")


def roles_stand_alone(source: Source) -> Iterator[Violation]:
    own = role_of(source.name)
    if own is None:
        return
    for line, name in imported_names(source):
        other = role_of(name)
        if other not in {None, own}:
            yield Violation(source.path, line, f"role {own} must not import role {other}: {name}")


def role_of(name: str) -> str | None:
    """The role of a module: ``roles/agent.py``, ``roles/agent_x.py`` and ``roles/agent/`` alike."""
    parts = name.split(".")
    if parts[:2] != ["swarmpull", "roles"] or len(parts) < 3:
        return None
    role = parts[2].partition("_")[0]
    return role if role in ROLES else None


def the_core_is_pure(source: Source) -> Iterator[Violation]:
    if layer_of(source.name) not in {"swarm", "base"}:
        return
    for line, name in imported_names(source):
        if name.partition(".")[0] in IMPURE:
            yield Violation(source.path, line, f"the core must not import {name}")
        if name.startswith("random.") and name != "random.Random":
            yield Violation(source.path, line, f"the core must not use the global {name}")
    for node in ast.walk(source.tree):
        match node:
            case ast.Attribute(value=ast.Name(id="random"), attr=name) if name != "Random":
                rule = f"the core must not use the global random.{name}"
                yield Violation(source.path, node.lineno, rule)


def heavy_dependencies_have_one_importer(source: Source) -> Iterator[Violation]:
    if layer_of(source.name) is None:
        return
    for line, name in imported_names(source):
        dependency = name.partition(".")[0]
        place = IMPORTER.get(dependency)
        if place is not None and not source.path.startswith(place):
            yield Violation(source.path, line, f"only {place} imports {dependency}")


def asyncio_is_absent(source: Source) -> Iterator[Violation]:
    for line, name in imported_names(source):
        if name.partition(".")[0] == "asyncio":
            yield Violation(source.path, line, "trio is the only event loop: no asyncio")


def functions_are_short(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                rule = f"{node.name} has {lines} lines, the limit is {FUNCTION_LINES_MAX}"
                yield Violation(source.path, node.lineno, rule)


def nothing_is_a_drawer(source: Source) -> Iterator[Violation]:
    for part in source.name.split("."):
        if part.strip("_") in {"util", "utils"} or part.endswith(("_util", "_utils")):
            yield Violation(source.path, 1, f"{part} names nothing: say what is in it")


def errors_are_named(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        match node:
            case ast.ExceptHandler(type=None):
                yield Violation(source.path, node.lineno, "bare except: name what is expected")
            case ast.ExceptHandler(
                type=ast.Name(id="Exception" | "BaseException"), body=[ast.Pass()]
            ):
                rule = "a handler that passes on Exception hides what was not expected"
                yield Violation(source.path, node.lineno, rule)


# The rules, and the folders that each is for.
RULES: Final[tuple[tuple[Rule, tuple[str, ...]], ...]] = (
    (imports_follow_the_direction, ("swarmpull",)),
    (roles_stand_alone, ("swarmpull",)),
    (the_core_is_pure, ("swarmpull",)),
    (heavy_dependencies_have_one_importer, ("swarmpull",)),
    (asyncio_is_absent, ("swarmpull", "benchmarks", "tests")),
    (functions_are_short, ("swarmpull", "benchmarks")),
    (nothing_is_a_drawer, ("swarmpull", "benchmarks", "tests")),
    (errors_are_named, ("swarmpull", "benchmarks", "tests")),
)


def sources(folder: str) -> Iterator[Source]:
    for path in sorted((TREE / folder).rglob("*.py")):
        relative = path.relative_to(TREE).as_posix()
        yield Source(relative, ast.parse(path.read_text(encoding="utf-8"), relative))


@pytest.mark.parametrize(
    ("rule", "folders"), RULES, ids=lambda value: getattr(value, "__name__", "")
)
def test_every_module_keeps_the_rule(rule: Rule, folders: tuple[str, ...]) -> None:
    modules = [source for folder in folders for source in sources(folder)]
    assert modules, "no module was found: the rule was not tried on anything"

    violations = [str(violation) for source in modules for violation in rule(source)]

    assert not violations, "\n" + "\n".join(violations)


def test_every_module_belongs_to_a_layer_that_has_a_rule() -> None:
    layers = {layer_of(source.name) for source in sources("swarmpull")}

    assert layers <= MAY_IMPORT.keys()


def test_the_order_of_the_layers_has_no_cycle() -> None:
    for layer, lower in MAY_IMPORT.items():
        for other in lower:
            assert layer not in MAY_IMPORT[other], f"{layer} and {other} may import each other"


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (imports_follow_the_direction, "swarmpull/store/x.py", "from swarmpull.wire import rpc"),
        (imports_follow_the_direction, "swarmpull/ring/x.py", "import swarmpull.wire.rpc"),
        (imports_follow_the_direction, "swarmpull/swarm/x.py", "from ..store import blobs"),
        (imports_follow_the_direction, "swarmpull/swarm/__init__.py", "from .. import cli"),
        (imports_follow_the_direction, "swarmpull/registry/x.py", "from swarmpull import roles"),
        (imports_follow_the_direction, "swarmpull/wire/x.py", "def f():\n import swarmpull.cli"),
        (imports_follow_the_direction, "swarmpull/digest.py", "from . import swarm"),
        (roles_stand_alone, "swarmpull/roles/agent.py", "from swarmpull.roles.origin import X"),
        (roles_stand_alone, "swarmpull/roles/index.py", "from swarmpull.roles import tracker"),
        (roles_stand_alone, "swarmpull/roles/agent_http.py", "from .origin import X"),
        (the_core_is_pure, "swarmpull/swarm/x.py", "import trio.lowlevel"),
        (the_core_is_pure, "swarmpull/swarm/x.py", "from time import monotonic"),
        (the_core_is_pure, "swarmpull/swarm/x.py", "from random import shuffle"),
        (the_core_is_pure, "swarmpull/swarm/x.py", "import random\nrandom.choice([1])"),
        (heavy_dependencies_have_one_importer, "swarmpull/roles/agent.py", "import httpx"),
        (heavy_dependencies_have_one_importer, "swarmpull/roles/agent.py", "import quart_trio"),
        (heavy_dependencies_have_one_importer, "swarmpull/store/blobs.py", "from blake3 import b"),
        (asyncio_is_absent, "tests/x.py", "from asyncio import run"),
        (functions_are_short, "swarmpull/x.py", "async def f():\n" + " 1\n" * 70),
        (nothing_is_a_drawer, "swarmpull/utils/x.py", ""),
        (nothing_is_a_drawer, "swarmpull/http_utils.py", ""),
        (errors_are_named, "swarmpull/x.py", "try:\n 1\nexcept:\n 1"),
        (errors_are_named, "swarmpull/x.py", "try:\n 1\nexcept Exception:\n pass"),
    ],
)
def test_a_module_that_breaks_a_rule_is_found(rule: Rule, path: str, text: str) -> None:
    violations = list(rule(Source(path, ast.parse(text))))

    assert len(violations) == 1
    assert violations[0].path == path


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (
            imports_follow_the_direction,
            "swarmpull/store/x.py",
            "from swarmpull.swarm import metainfo",
        ),
        (
            imports_follow_the_direction,
            "swarmpull/store/x.py",
            "from swarmpull.errors import StoreFull",
        ),
        (imports_follow_the_direction, "swarmpull/cli/x.py", "from swarmpull import __version__"),
        (roles_stand_alone, "swarmpull/roles/agent.py", "from swarmpull.roles.agent_http import X"),
        (
            roles_stand_alone,
            "swarmpull/roles/single.py",
            "from swarmpull.roles import agent, origin",
        ),
        (the_core_is_pure, "swarmpull/swarm/x.py", "from random import Random"),
        (the_core_is_pure, "swarmpull/swarm/x.py", "import random\nr: random.Random"),
        (the_core_is_pure, "swarmpull/wire/x.py", "import trio"),
        (heavy_dependencies_have_one_importer, "swarmpull/registry/app.py", "import quart"),
        (functions_are_short, "swarmpull/x.py", "async def f():\n" + " 1\n" * 69),
        (errors_are_named, "swarmpull/x.py", "try:\n 1\nexcept OSError:\n pass"),
    ],
)
def test_a_module_that_keeps_the_rules_is_left_alone(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, ast.parse(text)))) == []
