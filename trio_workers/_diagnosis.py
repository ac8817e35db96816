"""What bytes that are no answer most likely are, and what to mend. Without I/O.

A worker that is wrong shows it by bytes: text where a frame should be, a frame of another dialect, a checksum of the
wrong bytes, one frame too many. Each leaves marks of its own; this module knows them, the most certain first.
"""

from typing import Final
from zlib import crc32

import attrs

from ._goridge import Decoder, FrameError, printable
from ._process import readable

SHOWN: Final = 80
"""How many bytes of a reply or of stray output a line shows."""

PLAUSIBLE: Final = 1 << 40
"""A size above this in a header is no size: it is text, or a size whose bytes stand the other way round."""

MARK: Final = b"\xef\xbb\xbf"
"""UTF-8's byte order mark."""

_OLD_FLAGS: Final = frozenset((0x00, 0x02, 0x04, 0x10, 0x12, 0x14, 0x1C))
_HEADERS: Final = {"goridge-1": 9, "goridge-2": 17, "goridge-3": 12}
_ANY: Final = frozenset(range(256))


@attrs.frozen
class Diagnosis:
    """What is wrong: `kind` for the checker, `found` and `mend` for whoever wrote the worker.

    `kind` is stray (something else wrote to stdout), dialect, handshake, checksum, size, answers (a frame too many) or
    frame.
    """

    kind: str
    found: str
    mend: str


def show(data: bytes) -> str:
    """Show bytes on one line: as text where they are UTF-8, else escaped; cut after `SHOWN` bytes."""
    start = data[:SHOWN]
    more = "..." if len(data) > SHOWN else ""
    try:
        text = (start.decode("utf-8", "ignore") if more else start.decode("utf-8")).encode()
    except UnicodeDecodeError:
        return printable(start) + more
    lines = readable(text.replace(b"\r\n", b"\n")).replace("\\x0a", "\\n").replace("\t", "\\t")
    return f"'{lines}'{more}"


def dialect_of(data: bytes) -> str | None:
    """Return the dialect whose header stands at the front of these bytes, None where none does."""
    if len(data) >= 12 and 0x13 <= data[0] <= 0x1D and crc32(data[:6]) == int.from_bytes(data[6:10], "little"):
        return "goridge-3"
    if len(data) < 9 or data[0] not in _OLD_FLAGS:
        return None
    size = int.from_bytes(data[1:9], "little")
    if size > PLAUSIBLE:
        return None
    if len(data) >= 17 and size == int.from_bytes(data[9:17], "big"):
        return "goridge-2"
    return "goridge-1" if data[0] & 0x10 else None  # the body of an answer alone would be too little to go by


def frames_in_front(data: bytes, protocol: str, limit: int) -> tuple[int, bytes]:
    """Count the whole frames of a dialect at the front of these bytes, and return what follows them."""
    decoder = Decoder(protocol, limit, _ANY if protocol == "goridge-3" else _OLD_FLAGS, _ANY)
    decoder.receive(data)
    count = 0
    try:
        while decoder.next_frame() is not None:
            count += 1
    except FrameError:
        pass
    return count, decoder.leftover


def diagnose(
    data: bytes,
    protocol: str,
    limit: int,
    *,
    reason: str,
    after_answer: bool,
    shaken: bool,
    sent: bytes = b"",
    relay: str = "pipes",
) -> Diagnosis:
    """Say what these bytes are, with which a frame should have begun; `reason` is why they were refused.

    `after_answer`: they follow a whole answer, and nothing was asked. `shaken`: the handshake is done. `sent`: what the
    worker got as context and body, by which the rest of an echo is known.
    """
    count, rest = frames_in_front(data, protocol, limit)
    if count and after_answer:
        old = (
            ""
            if protocol == "goridge-3"
            else f" In {protocol} a job is two frames, context and body: only the second asks for an answer."
        )
        return Diagnosis(
            "answers",
            "A frame came that no job asked for: more answers than there were jobs.",
            f"Answer each job once. A control frame is no job, and what follows an error frame is not the reply.{old}",
        )
    if not count:
        other = dialect_of(data)
        if other is not None and other != protocol:
            if not shaken:
                return speaks(other)
            return Diagnosis(
                "dialect", f"A frame of {other} came.", "A worker speaks one dialect, from the handshake to the end."
            )
        rest = data
    if not shaken and not rest:
        return Diagnosis(
            "handshake",
            f"{sentence(reason)}; it wrote {printable(data)}.",
            'Answer the control frame {"pid":N} with a control frame {"pid":M}: M is the worker\'s own pid, a number.',
        )
    if not rest:
        return Diagnosis(
            "frame", f"{sentence(reason)}; it wrote {show(data)}.", "See docs/wire.md for what may come when."
        )
    for judge in (_cut_short, _stray, _checksum, _sizes):
        found = judge(rest, protocol, after_answer, sent, relay)
        if found is not None:
            return found
    return Diagnosis(
        "frame",
        f"{sentence(reason)}; it wrote {printable(rest)}.",
        f"This is no frame of {protocol}: see docs/wire.md for each byte of one.",
    )


def speaks(protocol: str) -> Diagnosis:
    """Say that a worker speaks another dialect."""
    return Diagnosis(
        "dialect",
        f"It speaks {protocol}.",
        f'Use --protocol {protocol}, and Config(protocol="{protocol}") in your program.',
    )


def stray(data: bytes, relay: str = "pipes") -> Diagnosis:
    """Say where something else than frames on the relay comes from, as far as it shows."""
    found = f"Something was printed to stdout: {show(data)}."
    if data.startswith(MARK):
        rest = data.removeprefix(MARK)
        also = f" After it came {show(rest)}." if rest and not rest.isspace() else ""
        return Diagnosis(
            "stray",
            f"A byte order mark (EF BB BF) was written to stdout.{also}",
            "Save the program as UTF-8 without BOM: in PHP all that stands before `<?php` is output.",
        )
    if data.isspace():
        return Diagnosis(
            "stray",
            f"Blank lines were written to stdout: {show(data)}.",
            "Remove the blank lines before `<?php` or after `?>`, in included files too; in other languages, look for "
            "an empty print.",
        )
    if any(word in data[:4096] for word in (b"Warning:", b"Notice:", b"Deprecated:", b"Fatal error:", b"Parse error:")):
        return Diagnosis(
            "stray",
            found,
            "PHP reports to stdout: set display_errors=stderr (`php -d display_errors=stderr worker.php`), and mend "
            "what it reports.",
        )
    if data.startswith(b"Could not open input file"):
        return Diagnosis(
            "stray", found, "Is the program's name right, seen from the directory it is started in (--cwd)?"
        )
    if relay != "pipes":
        return Diagnosis("stray", found.replace("printed to stdout", "written to the socket"), "Send frames alone.")
    return Diagnosis(
        "stray",
        found,
        "Over pipes stdout belongs to the relay: print to stderr, and let subprocesses and libraries do so.",
    )


def _cut_short(rest: bytes, protocol: str, after_answer: bool, sent: bytes, relay: str) -> Diagnosis | None:
    if not after_answer or not sent.lower().endswith(rest.lower()):
        return None
    return Diagnosis(
        "size",
        f"The last {len(rest):,} bytes of the answer are outside of its frame: {show(rest)}.",
        "The size in the header is too small. It counts bytes, not characters, and in goridge-3 the context as well.",
    )


def _stray(rest: bytes, protocol: str, after_answer: bool, sent: bytes, relay: str) -> Diagnosis | None:
    junk = rest[: _next_frame(rest, protocol)]
    body = junk.removeprefix(MARK)
    plain = sum(1 for byte in body if byte >= 0x20 or byte in b"\t\n\r\x1b")
    if plain < 0.9 * len(body):
        return None
    found = stray(junk, relay)
    if after_answer and not junk.endswith(b"\n"):
        # No line of output: it may as well be the end of an answer.
        more = " Unless nothing prints there: then the size in the answer's header is too small."
        return attrs.evolve(found, mend=found.mend + more)
    return found


def _next_frame(data: bytes, protocol: str) -> int:
    """Return where a frame begins after what is none, or the end."""
    for at in range(1, min(len(data), 4096)):
        if dialect_of(data[at : at + _HEADERS[protocol]]) == protocol:
            return at
    return len(data)


def _checksum(rest: bytes, protocol: str, after_answer: bool, sent: bytes, relay: str) -> Diagnosis | None:
    if protocol != "goridge-3" or not 0x13 <= rest[0] <= 0x1D or len(rest) < 12:
        return None
    theirs, right = rest[6:10], crc32(rest[:6])
    if int.from_bytes(theirs, "little") == right:
        return None
    start = 12 + 4 * ((rest[0] & 0x0F) - 3)
    if int.from_bytes(theirs, "big") == right:
        why = "Its bytes stand the other way round: it is little-endian, as all numbers in goridge-3."
    elif int.from_bytes(theirs, "little") in (crc32(rest[start:]), crc32(rest[12:])):
        why = "It was made of the payload."
    elif not any(theirs):
        why = "It is 0."
    else:
        why = "It was made of something else."
    return Diagnosis(
        "checksum",
        f"The checksum in the frame's header is wrong: {theirs.hex(' ')}, and not "
        f"{right.to_bytes(4, 'little').hex(' ')}.",
        f"{why} Bytes 6 to 9 are the CRC32 of bytes 0 to 5 of this frame's own header, little-endian.",
    )


def _sizes(rest: bytes, protocol: str, after_answer: bool, sent: bytes, relay: str) -> Diagnosis | None:
    if protocol == "goridge-3" or rest[0] not in _OLD_FLAGS or len(rest) < _HEADERS[protocol]:
        return None
    size = int.from_bytes(rest[1:9], "little")
    turned = int.from_bytes(rest[1:9], "big")
    if size > PLAUSIBLE and turned < PLAUSIBLE:
        return Diagnosis(
            "size",
            f"The size in the header, {rest[1:9].hex(' ')}, has its bytes the other way round.",
            "The size in bytes 1 to 8 is little-endian"
            + ("; goridge-2 has it a second time, big-endian, in bytes 9 to 16." if protocol == "goridge-2" else "."),
        )
    if protocol == "goridge-2" and size != int.from_bytes(rest[9:17], "big"):
        return Diagnosis(
            "size",
            f"The two sizes in the header disagree: {rest[1:9].hex(' ')} and {rest[9:17].hex(' ')}.",
            "Bytes 1 to 8 are the size, little-endian, and bytes 9 to 16 the same number, big-endian.",
        )
    return None


def sentence(text: str) -> str:
    """Begin a text with a capital, and leave the rest of it as it is."""
    return text[:1].upper() + text[1:]
