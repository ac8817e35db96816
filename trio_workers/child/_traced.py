"""A function that runs in the trace of its caller: what `trio_workers.tracing` sends to a worker in a function's place.

Only a worker that gets one loads this.
"""

import functools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Traced(functools.partial["Any"]):
    """A function, and the trace context it is to run in, in `carrier`: what `opentelemetry.propagate.inject` wrote.

    A partial, so that whoever looks for the function's own name, kind and pickling errors finds them, as in any other.
    """

    carrier: "dict[str, str]"

    def __call__(self, /, *args: "Any", **keywords: "Any") -> "Any":
        detach = _attach(self.carrier)
        try:
            return super().__call__(*args, **keywords)
        finally:
            if detach is not None:
                detach()


def _attach(carrier: "dict[str, str]") -> "Any":
    """Enter the context, where opentelemetry is there to be asked for it; return what leaves it."""
    try:
        from opentelemetry import context, propagate

        token = context.attach(propagate.extract(carrier))
    except Exception:
        return None  # it is not installed here, or broken: no reason for a job to fail
    return functools.partial(context.detach, token)
