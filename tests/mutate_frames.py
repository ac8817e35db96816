"""Send mutated frames through the three dialects: `python tests/mutate_frames.py [COUNT [SEED]]`.

Each case takes bytes that a worker may send, damages them, and feeds them in chunks to a `Conversation` (as the pool
reads them) and to a bare `Decoder` that accepts everything a dialect knows. The one exception that may come out is
`FrameError`; and at every moment what is held back is a suffix of what was fed, no more.

The seed is printed; the same count and seed repeat a run.
"""

import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from trio_workers._conversation import Conversation, Stage
from trio_workers._goridge import (
    MORE,
    PING,
    PONG,
    PROTOCOLS,
    STOP,
    STREAM_STOP,
    Decoder,
    FrameError,
    context_frame_3,
    encode_control,
    encode_error,
    encode_job,
    encode_reply,
    frame_3,
)

LIMIT: Final = 4096
FIRST: Final = {"goridge-1": frozenset((0, 2, 4, 0x10, 0x12, 0x14, 0x1C)), "goridge-3": frozenset((0x13, 0x14))}
BITS: Final = frozenset((0, MORE, STREAM_STOP, PING, PONG, MORE | PING))


def answers_of(protocol: str) -> tuple[bytes, ...]:
    """Whole answers to a job, to damage."""
    frames = [
        encode_reply(protocol, b"", b"hello"),
        encode_reply(protocol, b"ctx", b""),
        encode_reply(protocol, b"ctx" * 20, b"hello" * 40),
        encode_reply(protocol, STOP, b""),
        encode_error(protocol, b"boom"),
        encode_error(protocol, b""),
    ]
    if protocol == "goridge-3":
        part = context_frame_3(0, b"ctx", b"part", MORE)
        last = context_frame_3(0, b"", b"", PING)
        frames += [part + last, part + context_frame_3(0, b"", b"part", MORE | PING) + encode_error(protocol, b"boom")]
    return tuple(frames)


def others_of(protocol: str) -> tuple[bytes, ...]:
    """Frames that are no answer to a job."""
    frames = [
        encode_control(protocol, STOP),
        b"".join(encode_job(protocol, b"ctx", b"hello")),
        encode_error(protocol, bytes(LIMIT + 1)),
    ]
    if protocol == "goridge-3":
        frames += [frame_3(0, b"", bits) for bits in (STREAM_STOP, PING, PONG)]
    return tuple(frames)


SHAKES: Final = {protocol: encode_control(protocol, b'{"pid":4711}') for protocol in PROTOCOLS}
ANSWERS: Final = {protocol: answers_of(protocol) for protocol in PROTOCOLS}
OTHERS: Final = {protocol: others_of(protocol) for protocol in PROTOCOLS}


def mutate(rng: random.Random, data: bytearray, other: bytes) -> str:
    """Damage `data` in one way, and name it."""
    kind = rng.randrange(7)
    at = int(rng.random() * (len(data) + 1))
    if kind == 0:
        # Mostly towards the beginning, where the headers are.
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[int(rng.random() ** 2 * len(data))] ^= 1 << rng.randrange(8)
        return "bits flipped"
    if kind == 1:
        del data[at:]
        return "cut short"
    if kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
        return "bytes inserted"
    if kind == 3:
        data[at:] = other[int(rng.random() * (len(other) + 1)) :]
        return "spliced"
    if kind == 4:
        end = at + rng.randrange(1, 32)
        data[at:at] = data[at:end]
        return "a piece doubled"
    if kind == 5:
        del data[at : at + rng.randrange(1, 9)]
        return "a piece missing"
    if data:
        data[min(at, len(data) - 1)] = rng.choice((0, 1, 4, 0x10, 0x13, 0x14, 0x7F, 0x80, 0xFF))
    return "a byte replaced"


def converse(protocol: str, chunks: list[bytes]) -> tuple[str, bytes]:
    """Feed a conversation as the pool would, a job whenever the worker is idle; return how it ended, and the rest."""
    conversation = Conversation(protocol, LIMIT)
    fed = b""
    try:
        for chunk in chunks:
            conversation.receive(chunk)
            fed += chunk
            while True:
                if conversation.stage is Stage.IDLE:
                    conversation.begin_job()
                if conversation.next_event() is None:
                    break
            rest = conversation.leftover
            if not fed.endswith(rest):
                raise AssertionError(f"held back {rest!r}, which is not the end of {fed!r}")
    except FrameError as error:
        if len(str(error)) > 1000 or not fed.endswith(conversation.leftover):
            raise AssertionError(f"a bad refusal of {fed!r}") from error
        return "refused", conversation.leftover
    return "waits for more" if conversation.pending else "taken whole", conversation.leftover


def decode(protocol: str, chunks: list[bytes]) -> None:
    """Feed a decoder that takes any frame."""
    decoder = Decoder(protocol, LIMIT, FIRST["goridge-3" if protocol == "goridge-3" else "goridge-1"], BITS)
    fed = taken = 0
    try:
        for chunk in chunks:
            decoder.receive(chunk)
            fed += len(chunk)
            while (frame := decoder.next_frame()) is not None:
                taken += len(frame.context) + len(frame.body)
            if taken + len(decoder.leftover) > fed:
                raise AssertionError(f"{taken} bytes taken and {len(decoder.leftover)} held back of {fed} fed")
    except FrameError:
        pass


def run(count: int, seed: int) -> Counter[str]:
    """Run `count` cases; return what they were and how they ended."""
    rng = random.Random(seed)
    random_number = rng.random
    counts: Counter[str] = Counter()
    for number in range(count):
        protocol = PROTOCOLS[number % 3]
        answers = ANSWERS[protocol]
        # Three quarters leave the handshake whole, or few would get past it; most say nothing out of turn.
        whole_handshake = random_number() < 0.75
        data = bytearray() if whole_handshake else bytearray(SHAKES[protocol])
        for _ in range(1 + int(random_number() * 3)):
            data += rng.choice(answers if random_number() < 0.9 else OTHERS[protocol])
        for _ in range(1 + int(random_number() * 2)):
            counts[mutate(rng, data, rng.choice(answers))] += 1
        if whole_handshake:
            data[:0] = SHAKES[protocol]
        whole = bytes(data)
        cuts = sorted(int(random_number() * (len(whole) + 1)) for _ in range(int(random_number() * 3)))
        chunks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        try:
            ended, _ = converse(protocol, chunks)
            decode(protocol, chunks)
        except BaseException as error:
            error.add_note(f"case {number} of seed {seed}: {protocol}, {chunks!r}")
            raise
        counts[f"{protocol}: {ended}"] += 1
    return counts


def main(arguments: list[str]) -> None:
    """Run as a script."""
    count = int(arguments[0]) if arguments else 1_000_000
    seed = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().randrange(1 << 32)
    print(f"{count:,} mutated frames, seed {seed}", flush=True)
    start = time.perf_counter()
    for name, number in sorted(run(count, seed).items()):
        print(f"{number:>11,}  {name}")
    print(f"no exception but FrameError, in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
