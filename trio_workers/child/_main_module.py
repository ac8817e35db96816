"""The application's main module, inside a worker: imported when something of it is first needed, and never before.

`sys.modules["__main__"]` is at first the few lines that started the interpreter. Given a `__getattr__`, that module
notices when somebody looks for a name of the real one (pickle does, for each function and class of it), and then the
real one is run under the name `__mp_main__`, as the multiprocessing module does it: code behind
`if __name__ == "__main__"` is not run, and what is pickled from it is found by the pool, where that name is known too.
"""

import sys

from .._calls import in_short, members

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType, ModuleType
    from typing import Any

NAME = "__mp_main__"

GUARD = (
    "open_python_pool() was called while a worker imported the main module, because that module opens its pool without "
    'a guard: put the call behind `if __name__ == "__main__":`, or move the functions that are jobs to a module of '
    'their own, or use pickler="cloudpickle"'
)

BEHIND = (
    'Workers import the main module without what stands behind `if __name__ == "__main__":`; move what jobs need in '
    "front of that, or to a module of its own"
)

described: "tuple[str, str] | str" = ""
"""Where the main module is to be found: ("script" | "directory" | "module", path or name); else why it can't be."""

importing: bool = False
"""Whether the main module is being run at this moment: no pool may be opened by it."""

_module: "ModuleType | None" = None
_failure: "BaseException | None" = None


class MainModuleError(ImportError):
    """The application's main module could not be imported by a worker."""


def install(description: "tuple[str, str] | str") -> None:
    """Let the present `__main__` stand for the application's, until something of that is needed."""
    global described
    described = description
    stub = sys.modules["__main__"]
    for name in [name for name in vars(stub) if not (name.startswith("__") and name.endswith("__"))]:
        delattr(stub, name)  # or a job of this name would be taken for ours
    stub.__getattr__ = _look_up  # type: ignore[method-assign]


def answer_to_its_name(error: BaseException) -> bool:
    """Whether it was the main module's name in workers that could not be imported, and can be from now on.

    A pool inside a job sends that name, as its own main module has it. It is not known from the start: pickle looks for
    objects without a module in every module there is, and would run the main module for them.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name != NAME or NAME in sys.modules:
        return False
    sys.modules[NAME] = sys.modules["__main__"]
    return True


def _look_up(name: str) -> object:
    # Whoever asks for a dunder name looks at the module, not for something in it.
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(f"module '__main__' has no attribute {name!r}")
    return getattr(load(), name)


def load() -> "ModuleType":
    """Return the application's main module; run it if that has not been done. Raise `MainModuleError`."""
    if _module is not None:
        return _module
    if isinstance(described, str):
        raise MainModuleError(described)
    if _failure is not None:
        raise MainModuleError(str(_failure)) from _failure.__cause__
    return _run(*described)


def _run(kind: str, where: str) -> "ModuleType":
    global importing, _module, _failure
    from types import ModuleType

    module = ModuleType(NAME)
    before = {name: sys.modules.get(name) for name in ("__main__", NAME)}
    sys.modules[NAME] = sys.modules["__main__"] = _module = module
    importing = True
    try:
        exec(_find_code(module, kind, where), module.__dict__)
    except BaseException as error:
        for name, stub in before.items():
            if stub is None:
                del sys.modules[name]
            else:
                sys.modules[name] = stub
        _module = None
        text = f"the main module {where} could not be imported in a worker: {_first(error)}"
        _failure = MainModuleError(text)
        _failure.__cause__ = error
        raise _failure  # noqa: B904 - its cause is set
    finally:
        importing = False
    return module


def _first(error: BaseException) -> str:
    # The sentence about the guard may be inside a group, or behind what the program made of it.
    seen: list[BaseException] = [error]
    for one in seen:
        if GUARD in str(one) and not members(one):
            return GUARD
        seen += members(one)
        seen += [other for other in (one.__cause__, one.__context__) if other is not None and other not in seen]
    return in_short(error)


def _find_code(module: "ModuleType", kind: str, where: str) -> "CodeType":
    """Find the module's code, and set what belongs to a main module started that way."""
    if kind == "script":
        module.__file__ = where
        with open(where, "rb") as file:
            data = file.read()
        if where.endswith(".pyc"):
            import marshal

            code: CodeType = marshal.loads(data[16:])
            return code
        return compile(data, where, "exec", dont_inherit=True)
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    name = "__main__" if kind == "directory" else where
    spec = PathFinder.find_spec(name, [where]) if kind == "directory" else find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"there is no module {name} in {where}" if kind == "directory" else f"no {name}")
    if spec.origin is not None:
        module.__file__ = spec.origin
    module.__spec__ = spec
    module.__package__ = spec.parent
    module.__loader__ = spec.loader
    loader: Any = spec.loader
    found: CodeType | None = loader.get_code(spec.name)
    if found is None:
        raise ImportError(f"there is no code of {spec.name}")
    return found
