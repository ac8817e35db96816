"""What is said over a control socket: one JSON document a line both ways, without I/O.

A request is a bare word, so that a terminal is enough, or a document: `resize 3` and `{"do": "resize", "to": 3}` are
one. Whatever else comes is a `BadRequest`, whose text says what is understood.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

import attrs

LONGEST_REQUEST: Final = 4096
"""Bytes of a line to the pool. The longest that means anything has 28; the rest is for spaces and escapes."""

LONGEST_ANSWER: Final = 16 * 1024 * 1024
"""Bytes of a line from the pool: a worker takes about 300, its last error some thousand."""

MOST_WORKERS: Final = 1000
"""What `resize` takes at most. A digit too many must not cost the machine; the application itself may ask for more."""

WORDS: Final = ("status", "workers", "reset", "resize", "watch")
UNDERSTOOD: Final = 'understood are: status, workers, reset, resize N, watch; or JSON, as in {"do":"resize","to":3}'
RESIZE: Final = f'resize takes a whole number from 1 to {MOST_WORKERS}, as in resize 3 or {{"do":"resize","to":3}}'

SHOWN: Final = 60
"""Characters of what was not understood that are shown again."""


class BadRequest(Exception):
    """A line that means nothing here. Its text says what would."""


class LineTooLong(Exception):
    """More bytes than a line may have came without an end of line."""


@attrs.frozen
class Request:
    """What somebody asks for. `to` is a number for resize, and None for all else."""

    do: str
    to: int | None = None


class LineBuffer:
    """Bytes as they come, and the lines that are whole."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._data = bytearray()
        self._searched = 0

    def receive(self, data: bytes) -> None:
        """Take what came."""
        self._data += data

    def next_line(self) -> bytes | None:
        """Return the next whole line without its end, None where there is none. Raise `LineTooLong`."""
        data = self._data
        end = data.find(b"\n", self._searched)
        if end > self._longest or (end < 0 and len(data) > self._longest):
            raise LineTooLong
        if end < 0:
            self._searched = len(data)
            return None
        line = bytes(data[:end])
        del data[: end + 1]
        self._searched = 0
        return line

    @property
    def has_line(self) -> bool:
        """Whether `next_line` has one."""
        return b"\n" in self._data

    def rest(self) -> bytes:
        """Take the line that has no end, once nothing more comes."""
        line = bytes(self._data)
        self._data.clear()
        self._searched = 0
        return line


def parse_request(line: bytes) -> Request:
    """Read a line. An empty one is `status`: it is what Enter sends. Raise `BadRequest` for what is not understood."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        raise BadRequest(f"{_show(line.decode(errors='backslashreplace'))} is not UTF-8; {UNDERSTOOD}") from None
    if text.startswith("{"):
        return _parse_document(text)
    word, *rest = text.split() or ["status"]
    if word not in WORDS:
        raise BadRequest(f"{_show(text)} is not understood; {UNDERSTOOD}")
    if word == "resize":
        number = rest[0] if len(rest) == 1 else ""
        # More digits are no number that is allowed, and need not be turned into one.
        if not (number.isascii() and number.isdecimal() and len(number) <= SHOWN):
            raise BadRequest(f"{_show(text)} is not understood; {RESIZE}")
        return _resize(int(number))
    if rest:
        raise BadRequest(f"{word} takes nothing more, and there is {_show(' '.join(rest))}; {UNDERSTOOD}")
    return Request(word)


def _parse_document(text: str) -> Request:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        # RecursionError: some thousand brackets fit into a line.
        why = error.msg if isinstance(error, json.JSONDecodeError) else "a document with too much in it"
        raise BadRequest(f"{_show(text)} is no JSON that can be read ({why}); {UNDERSTOOD}") from None
    word = document.get("do")
    if not isinstance(word, str) or word not in WORDS:
        raise BadRequest(f'"do" is {_show_value(document, "do")}; {UNDERSTOOD}')
    allowed = ("do", "to") if word == "resize" else ("do",)
    for key in document:
        if key not in allowed:
            raise BadRequest(f"{word} does not know {_show(key)}; {UNDERSTOOD}")
    if word != "resize":
        return Request(word)
    number = document.get("to")
    if not isinstance(number, int) or isinstance(number, bool):
        raise BadRequest(f'"to" is {_show_value(document, "to")}; {RESIZE}')
    return _resize(number)


def _resize(number: int) -> Request:
    if not 1 <= number <= MOST_WORKERS:
        shown = number if abs(number) < 10**SHOWN else "far beyond"
        raise BadRequest(f"the number of workers is {shown}; {RESIZE}")
    return Request("resize", number)


def _show(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def _show_value(document: dict[str, Any], key: str) -> str:
    """Show what stands under a key. No number is written out: it may have more digits than Python likes to write."""
    if key not in document:
        return "missing"
    value = document[key]
    return _show(value) if isinstance(value, str) else f"a value of type {type(value).__name__}"


def encode_request(request: str | Mapping[str, object]) -> bytes:
    """Make a line of a request. Raise TypeError or ValueError for what is none that fits into a line."""
    if isinstance(request, str):
        if "\n" in request:
            raise ValueError(f"a request is one line, and {_show(request)} is more")
        line = request.encode()
    elif isinstance(request, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        line = json.dumps(dict(request)).encode()
    else:
        raise TypeError(f"a request must be a str or a mapping, not {type(request).__name__}")
    if len(line) > LONGEST_REQUEST:
        raise ValueError(f"a request has at most {LONGEST_REQUEST} bytes, and this one {len(line)}")
    return line + b"\n"


def encode_answer(**fields: object) -> bytes:
    """Make the line of an answer to what was done."""
    return encode({"ok": True, **fields})


def encode_refusal(error: str) -> bytes:
    """Make the line of an answer to what was not done."""
    return encode({"ok": False, "error": error})


def encode(document: dict[str, object]) -> bytes:
    """Make a line. All but ASCII is escaped, so that nothing in it can turn a terminal upside down."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def decode_answer(line: bytes) -> dict[str, Any]:
    """Read a line from the pool. Raise ValueError for what is none."""
    try:
        document: Any = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError:
        raise ValueError("it speaks no JSON") from None
    if isinstance(document, dict):
        answer: dict[str, Any] = document  # pyright: ignore[reportUnknownVariableType]
        if isinstance(answer.get("ok"), bool):
            return answer
    raise ValueError("its answer has no ok")


def is_picture(answer: Mapping[str, Any]) -> bool:
    """Whether an answer is one of `watch`: those alone have both."""
    return "status" in answer and "workers" in answer
