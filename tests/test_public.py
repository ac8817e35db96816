"""The public face: what is exported, how it is loaded, and which module may import which."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Final

import pytest

import trio_workers
import trio_workers.child
from trio_workers import _platform

ROOT: Final = Path(__file__).parent.parent
PACKAGE: Final = ROOT / "trio_workers"

# As in the design's list of the layout: a module imports only what stands before it.
LAYOUT: Final = (
    "_goridge",
    "_arena",
    "_calls",
    "_region",
    "_conversation",
    "_model",
    "_errors",
    "_platform",
    "_identity",
    "_socket_file",
    "_relay",
    "_call_line",
    "_process",
    "_worker",
    "_factories",
    "_sockets",
    "_interpreter",
    "_config",
    "_codec",
    "_functions",
    "_backoff",
    "_growth",
    "_seats",
    "_roster",
    "_exchange",
    "_supervise",
    "_core",
    "_map",  # before the pool, which has `Pool.map`
    "_pace",
    "_chunks",
    "_pool",
    "_python_pool",
    "child._relay",
    "child",
    "child._main_module",
    "child._functions",
    "child._start",
    "child._traced",
    "testing",
    "_watch",  # from here on, outside the core: nothing above imports any of it
    "metrics",
    "tracing",
    "reload",
    "_control_protocol",
    "_control_place",
    "_control_server",
    "control",
    "_signals",
    "_diagnosis",
    "_check_session",
    "_checker",
    "_status_app",
    "_status_server",
    "status",
    "cli._errors",
    "cli._check",
    "cli._keys",
    "cli._top_view",
    "cli._reach",
    "cli._turn",
    "cli._top",
    "cli._settings",
    "cli._jobs",
    "cli._watching",
    "cli._run",
    "cli._bench",
    "cli._demo",
    "cli._app",
    "cli",
    "__main__",
)

STANDARD_LIBRARY_ONLY: Final = (
    "__init__",
    "_goridge",
    "_arena",
    "_calls",
    "_region",
    "child._relay",
    "child",
    "child._main_module",
    "child._functions",
    "child._start",
    "child._traced",
)
OPTIONAL: Final = {
    "_functions": {"cloudpickle"},
    "child._functions": {"cloudpickle"},
    "_platform": {"psutil"},
    "_status_app": {"prometheus_client", "starlette"},
    "_status_server": {"hypercorn"},
    "reload": {"watchfiles"},
    "cli._settings": {"cattrs", "cyclopts"},
    "cli._run": {"cyclopts", "rich"},
    "cli._bench": {"rich"},
    "cli._demo": {"rich"},
    "cli._app": {"cyclopts"},
    "child._traced": {"opentelemetry"},
    "metrics": {"prometheus_client"},
    "tracing": {"opentelemetry"},
    "cli._check": {"cyclopts", "rich"},
    "cli._reach": {"cattrs", "cyclopts"},
    "cli._top": {"cyclopts", "rich"},
    "cli._top_view": {"rich"},
    "cli._turn": {"cyclopts", "rich"},
}
"""What a module imports where a user asked for it, behind an extra."""

SANS_IO: Final = {
    "_goridge": {"select", "struct", "zlib"},  # of select a constant
    "_calls": {"collections", "io", "struct"},  # of io a buffer
    "_conversation": {"collections", "enum", "json", "os", "typing"},  # of os the pid
}


def python(program: str, *arguments: str, site: bool = True) -> str:
    """Run a program in a fresh interpreter; without `site` nothing is loaded that it does not load."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *([] if site else ["-S"]), "-c", program, *arguments],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def path_of(module: str) -> Path:
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


# names


@pytest.mark.parametrize("module", [trio_workers, trio_workers.child])
def test_all_is_sorted(module: types.ModuleType) -> None:
    """`__all__` has each name once, in the order that ruff gives it (constants, classes, functions)."""
    names = module.__all__
    assert len(set(names)) == len(names)
    groups = [sorted(name for name in names if kind(name)) for kind in (str.isupper, is_class_name, str.islower)]
    assert [name for group in groups for name in group] == list(names)


def is_class_name(name: str) -> bool:
    return not name.isupper() and name[0].isupper()


def test_all_can_be_imported() -> None:
    """Each name of `__all__` is there, and is defined in this package."""
    for name in trio_workers.__all__:
        value = getattr(trio_workers, name)
        assert not name.startswith("_")
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__name__ == name
            assert value.__module__.partition(".")[0] == "trio_workers"
    namespace: dict[str, object] = {}
    exec("from trio_workers import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(trio_workers.__all__)


def test_lists_agree() -> None:
    """`__all__`, the lazy table and what checkers see are the same names."""
    assert sorted(trio_workers._HOMES) == sorted(trio_workers.__all__)
    seen: dict[str, str] = {}
    for node in ast.walk(ast.parse(path_of("").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            assert node.module
            seen.update({alias.name: node.module for alias in node.names})
    assert seen == trio_workers._HOMES


def test_public_classes_are_exported() -> None:
    """Whatever a public name's signature speaks of is public too: no private class leaks out."""
    private = {
        name
        for module in LAYOUT
        if module.startswith("_")
        for name, value in vars(importlib.import_module(f"trio_workers.{module}")).items()
        if inspect.isclass(value) and value.__module__.startswith("trio_workers._") and name not in trio_workers.__all__
    }
    leaks: set[str] = set()
    for name in trio_workers.__all__:
        value = getattr(trio_workers, name)
        members = vars(value) if inspect.isclass(value) else {name: value}
        for member, function in members.items():
            if isinstance(function, property):
                function = function.fget
            function = inspect.unwrap(function) if callable(function) else None
            if member.startswith("_") and member != "__init__":
                continue
            for annotation in getattr(function, "__annotations__", {}).values():
                words = set(re.findall(r"\w+", annotation if isinstance(annotation, str) else repr(annotation)))
                leaks |= {f"{name}.{member}: {word}" for word in words & private}
    # A factory of one's own makes a `Line` and a `Conversation` and gives them away; events are the pool's business.
    assert {leak for leak in leaks if not leak.startswith(("Line.", "Conversation."))} == set()


def test_dir() -> None:
    """`dir` shows the public names before they are loaded, and of ours nothing else."""
    shown = set(
        python("import trio_workers; print(*dir(trio_workers))").split(),
    )
    assert set(trio_workers.__all__) <= shown
    assert {name for name in shown if not name.startswith("_")} <= {*trio_workers.__all__, "TYPE_CHECKING"}


def test_unknown_name() -> None:
    """A name that isn't there is an AttributeError, and an ImportError in an import."""
    with pytest.raises(AttributeError, match="'trio_workers' has no attribute 'Pol'"):
        _ = trio_workers.Pol  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from trio_workers import Pol")
    assert not hasattr(trio_workers, "__path")


def test_every_public_name_has_a_docstring() -> None:
    """Whoever asks `help` is told."""
    for name in trio_workers.__all__:
        value = getattr(trio_workers, name)
        if not inspect.isclass(value) and not inspect.isfunction(value):
            continue
        assert value.__doc__, name
        for member, function in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
                assert inspect.getdoc(getattr(value, member)), f"{name}.{member}"


# loading


def test_child_loads_neither_trio_nor_attrs() -> None:
    """A worker imports `trio_workers.child`, and of the package nothing else but what both sides use."""
    program = "import sys; before = {*sys.modules}; import trio_workers.child; print(*{*sys.modules} - before)"
    loaded = set(python(program, site=False).split())
    assert not loaded & {"trio", "attr", "attrs", "typing", "enum", "re", "importlib", "json", "logging", "socket"}
    ours = {name for name in loaded if name.startswith("trio_workers")}
    assert ours == {"trio_workers", "trio_workers._goridge", "trio_workers.child", "trio_workers.child._relay"}


def test_package_loads_nothing() -> None:
    """The package alone loads none of its modules."""
    program = "import sys; before = {*sys.modules}; import trio_workers; print(*{*sys.modules} - before)"
    assert set(python(program, site=False).split()) == {"trio_workers"}


def test_every_name_can_be_the_first() -> None:
    """Whichever name is imported first, its module finds what it needs: there is no circle."""
    program = """
import importlib, sys
import trio
import trio_workers
for name in trio_workers.__all__:
    for module in [module for module in sys.modules if module.startswith("trio_workers")]:
        del sys.modules[module]
    package = importlib.import_module("trio_workers")
    assert not [module for module in sys.modules if module.startswith("trio_workers.")]
    exec(f"from trio_workers import {name}")
    assert vars(package)[name] is getattr(package, name)
"""
    assert python(program) == ""


def test_every_module_can_be_the_first() -> None:
    """There is no circle among the modules either, and no import prints or warns."""
    program = """
import importlib, sys
import trio
for name in sys.argv[1:]:
    for module in [module for module in sys.modules if module.startswith("trio_workers")]:
        del sys.modules[module]
    importlib.import_module(f"trio_workers.{name}")
"""
    assert python(program, *LAYOUT) == ""


def test_windows() -> None:
    """On Windows what needs processes says in one sentence that it does not run there, and nothing else fails."""
    program = """
import attrs, trio  # which run there, with modules that are not installed here
import os, select, sys
sys.platform = "win32"
del os.waitid, os.fork, os.killpg, select.PIPE_BUF
import trio_workers.child
for name in "Payload JobError STOP_REQUEST Config SocketFactory open_pool open_python_pool open_worker".split():
    try:
        getattr(trio_workers, name)
    except ImportError as error:
        print(name, error)
"""
    said = python(program).splitlines()
    refused = ["Config", "SocketFactory", "open_pool", "open_python_pool", "open_worker"]
    assert [line.partition(" ")[0] for line in said] == refused
    for line in said:
        assert "trio_workers needs a Unix" in line
        assert "Windows" in line


def test_this_system() -> None:
    """What is Linux-only is used on Linux, and a fallback elsewhere."""
    assert isinstance(_platform.HERE, _platform.Linux if sys.platform == "linux" else _platform.Portable)


# layout


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """What a module imports when it runs: of this package, and of others. What only checkers see does not count."""
    path = path_of(module)
    package = f"trio_workers.{module}".split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    ours: set[str] = set()
    others: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.orelse:
                visit(child)
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = [f"{source}.{alias.name}" for alias in node.names]
            # `from . import _platform` names modules, `from ._platform import HERE` what is in one.
            names = [name if path_of(name.removeprefix("trio_workers.")).exists() else source for name in inner]
        for name in names:
            if name == "trio_workers" or name.startswith("trio_workers."):
                ours.add(name.removeprefix("trio_workers").removeprefix("."))
            else:
                others.add(name.partition(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return ours, others


def test_every_module_has_its_place() -> None:
    """A new module stands in the list."""
    modules = {
        info.name.removeprefix("trio_workers.")
        for info in pkgutil.walk_packages([str(PACKAGE)], prefix="trio_workers.")
    }
    assert modules == set(LAYOUT)


@pytest.mark.parametrize("module", LAYOUT)
def test_imports_only_what_stands_before(module: str) -> None:
    """A module imports only what stands before it in the layout."""
    ours, _ = imports_of(module)
    assert ours <= set(LAYOUT[: LAYOUT.index(module)])


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_standard_library_only(module: str) -> None:
    """What a worker loads needs nothing but Python, and of this package only what both sides use."""
    ours, others = imports_of("" if module == "__init__" else module)
    assert others - OPTIONAL.get(module, set()) <= sys.stdlib_module_names
    assert ours <= {
        "_goridge", "_arena", "_calls", "_region", "child._relay", "child._main_module", "child._functions",
    }  # fmt: skip


@pytest.mark.parametrize("module", SANS_IO)
def test_sans_io(module: str) -> None:
    """The wire and the conversation do no I/O, and know nothing of trio."""
    assert imports_of(module)[1] <= SANS_IO[module]


def test_roster_knows_neither_trio_nor_clock() -> None:
    """The pool's decisions have no trio, no clock and no process in them."""
    ours, others = imports_of("_seats")
    assert others <= {"attrs", "collections", "enum", "math", "typing"}
    assert ours <= {"_model"}
    for module in ("_backoff", "_growth"):
        ours, others = imports_of(module)
        assert others <= {"collections", "math", "random", "typing"}
        assert not ours
    ours, others = imports_of("_roster")
    assert others <= {"collections", "math", "random", "typing"}
    assert ours <= {"_backoff", "_growth", "_model", "_seats"}


def test_dependencies() -> None:
    """The core needs trio and attrs, and nothing else."""
    for module in LAYOUT:
        others = imports_of(module)[1] - OPTIONAL.get(module, set())
        assert others <= {*sys.stdlib_module_names, "trio", "attrs"}
