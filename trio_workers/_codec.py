"""Between payloads and frames: what `Pool` puts on top of a core."""

from collections.abc import Sequence
from typing import Protocol

from ._config import Config
from ._conversation import Failed
from ._errors import JobError
from ._goridge import encode_job
from ._model import Payload, payload_of


class Answer(Protocol):
    """What a codec's `decode` gets: a whole reply or a part of one."""

    @property
    def context(self) -> bytes: ...
    @property
    def body(self) -> bytes: ...
    @property
    def buffers(self) -> Sequence[bytes | bytearray]: ...


class Codec(Protocol):
    """What a pool core needs of a codec; how a job's frames come about is the pool's own affair.

    `dialect` names the wire. A job that was encoded for another one, before a `reset`, is encoded anew. `recalls`: its
    lines can take back jobs that the worker has not read.
    """

    @property
    def dialect(self) -> str: ...
    @property
    def recalls(self) -> bool: ...
    def encode(self, payload: Payload) -> tuple[bytes | memoryview, ...]: ...
    def encode_anew(self, payload: Payload) -> tuple[bytes | memoryview, ...]: ...
    def failure(self, outcome: Failed) -> Exception: ...


class PayloadCodec:
    """Turns payloads into frames and answers into payloads: what `Pool` puts on top of a core."""

    def __init__(self, config: Config) -> None:
        self.dialect = config.protocol
        self.recalls = False
        # The sizes of goridge-3 are 32 bits wide, those of the older dialects 64.
        self._limit = min(config.max_frame_size, 2**32 - 1) if config.protocol == "goridge-3" else config.max_frame_size

    def encode(self, payload: object) -> tuple[bytes | memoryview, ...]:
        """Turn a payload into frames, or raise an error before any worker is taken."""
        if not isinstance(payload, Payload):
            raise TypeError(f"a job must be a Payload, such as Payload(b'...'), not {type(payload).__name__}")
        body, context = payload.body, payload.context
        if len(body) + len(context) > self._limit:
            self._check_frames(len(body), len(context))
        return encode_job(self.dialect, context, body)

    def encode_anew(self, payload: Payload) -> tuple[bytes | memoryview, ...]:
        """Turn a payload into frames that has been accepted already."""
        return encode_job(self.dialect, payload.context, payload.body)

    def failure(self, outcome: Failed) -> JobError:
        """Turn a job error into an exception."""
        return JobError(outcome.message)

    def _check_frames(self, body: int, context: int) -> None:
        # In goridge-3 both are one frame, in the older dialects one each.
        largest = body + context if self.dialect == "goridge-3" else max(body, context)
        if largest > self._limit:
            raise ValueError(f"a job of {largest:,} bytes is larger than Config.max_frame_size ({self._limit:,})")


def check_label(label: object) -> str | None:
    """Return the label, or raise an error that names it."""
    if label is not None and not isinstance(label, str):
        raise TypeError(f"label must be a str or None, not {type(label).__name__}")
    return label


def decode(answer: Answer) -> Payload:
    """Turn an answer into a payload."""
    return payload_of(answer.body, answer.context)
