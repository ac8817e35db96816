"""Worker processes for trio: pools of programs in any language that speak goridge, owned by a nursery.

The names are loaded when they are first used: a worker that is written in Python imports `trio_workers.child`, and so
this package, and must not pay for trio.
"""

TYPE_CHECKING = False  # typing alone would double what a worker pays
if TYPE_CHECKING:
    from ._config import Config, Limits, Restart
    from ._control_server import serve_control
    from ._conversation import Conversation
    from ._core import PoolStatistics
    from ._errors import (
        AllocateTimeout,
        JobError,
        JobTimeout,
        QueueFull,
        RelayError,
        RemoteTraceback,
        RestartLimitExceeded,
        SpawnError,
        TrioWorkersInternalError,
        WorkerCrashed,
        WorkerError,
        WorkersError,
    )
    from ._exchange import Parts
    from ._factories import Factory, PipeFactory, Spawner
    from ._map import Results
    from ._model import STOP_REQUEST, JobRecord, Payload, State, WorkerEvent, WorkerState
    from ._pool import Lease, Pool, open_pool, open_worker
    from ._process import Launch, WorkerProcess
    from ._python_pool import PythonPool, PythonWorker, open_python_pool
    from ._relay import Line, Relay, StreamRelay
    from ._signals import serve_signals
    from ._sockets import SocketFactory
    from ._worker import CurrentJob, Worker

__all__ = [
    "STOP_REQUEST",
    "AllocateTimeout",
    "Config",
    "Conversation",
    "CurrentJob",
    "Factory",
    "JobError",
    "JobRecord",
    "JobTimeout",
    "Launch",
    "Lease",
    "Limits",
    "Line",
    "Parts",
    "Payload",
    "PipeFactory",
    "Pool",
    "PoolStatistics",
    "PythonPool",
    "PythonWorker",
    "QueueFull",
    "Relay",
    "RelayError",
    "RemoteTraceback",
    "Restart",
    "RestartLimitExceeded",
    "Results",
    "SocketFactory",
    "SpawnError",
    "Spawner",
    "State",
    "StreamRelay",
    "TrioWorkersInternalError",
    "Worker",
    "WorkerCrashed",
    "WorkerError",
    "WorkerEvent",
    "WorkerProcess",
    "WorkerState",
    "WorkersError",
    "open_pool",
    "open_python_pool",
    "open_worker",
    "serve_control",
    "serve_signals",
]

_MODULES = {
    "_config": ("Config", "Limits", "Restart"),
    "_control_server": ("serve_control",),
    "_conversation": ("Conversation",),
    "_core": ("PoolStatistics",),
    "_errors": (
        "AllocateTimeout",
        "JobError",
        "JobTimeout",
        "QueueFull",
        "RelayError",
        "RemoteTraceback",
        "RestartLimitExceeded",
        "SpawnError",
        "TrioWorkersInternalError",
        "WorkerCrashed",
        "WorkerError",
        "WorkersError",
    ),
    "_exchange": ("Parts",),
    "_factories": ("Factory", "PipeFactory", "Spawner"),
    "_map": ("Results",),
    "_model": ("STOP_REQUEST", "JobRecord", "Payload", "State", "WorkerEvent", "WorkerState"),
    "_pool": ("Lease", "Pool", "open_pool", "open_worker"),
    "_process": ("Launch", "WorkerProcess"),
    "_python_pool": ("PythonPool", "PythonWorker", "open_python_pool"),
    "_relay": ("Line", "Relay", "StreamRelay"),
    "_signals": ("serve_signals",),
    "_sockets": ("SocketFactory",),
    "_worker": ("CurrentJob", "Worker"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:

    def __getattr__(name):
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
