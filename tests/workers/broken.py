"""Workers that are wrong, each in one way: `python broken.py FAULT`. Without a fault it is a right one.

It answers with the body and the context that it got; the body `fail` is a job error.
"""

import os
import signal
import sys
import time
from typing import Final
from zlib import crc32

from trio_workers._goridge import encode_control, encode_error, encode_reply

fault: Final = sys.argv[1] if len(sys.argv) > 1 else ""
protocol: Final = fault if fault.startswith("goridge-") else os.environ["TRIO_WORKERS_PROTOCOL"]
new: Final = protocol == "goridge-3"
header_size: Final = {"goridge-1": 9, "goridge-2": 17, "goridge-3": 12}[protocol]

held = b""  # what a worker without flush holds back


def write(data: bytes) -> None:
    global held
    if fault == "no-flush":
        held += data
        return
    while data:
        data = data[os.write(1, data) :]


def read(size: int) -> bytes:
    """Exactly so many bytes, or fewer at the end."""
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        data += piece
        if not piece or fault == "one-read" or (fault == "one-read-of-header" and size == header_size):
            break
    return data


def next_frame() -> tuple[str, bytes, bytes] | None:
    """What the frame is, its context and its body."""
    context = b""
    while True:
        header = read(header_size)
        if fault == "one-read-of-header" and 0 < len(header) < header_size:
            raise SystemExit("short header")
        if len(header) < header_size:
            return None
        if new:
            options = header[0] & 0x0F > 3
            size = int.from_bytes(header[2:6], "little")
            split = int.from_bytes(read(4), "little") if options else 0
            payload = read(size)
            if header[1] & 1:
                return "control", b"", payload
            if fault == "context-in-body":
                split = 0
            return "job", payload[:split], payload[split:]
        flags, size = header[0], int.from_bytes(header[1:9], "little")
        payload = read(size)
        if flags == 0x10:
            return "control", b"", payload
        if flags == 0:
            return "job", context, payload
        context = payload
        if fault == "context-is-a-job":
            return "job", b"", payload


def reply(context: bytes, body: bytes) -> bytes:
    frame = bytearray(encode_reply(protocol, context, body))
    if fault in ("size-small", "size-large"):
        at = 0 if new else len(frame) - len(body) - header_size  # of the body's frame, in the older dialects
        size = len(context) * new + len(body) + (3 if fault == "size-large" else -3)
        if new:
            frame[2:6] = size.to_bytes(4, "little")
            frame[6:10] = crc32(frame[:6]).to_bytes(4, "little")
        else:
            frame[at + 1 : at + 9] = size.to_bytes(8, "little")
            frame[at + 9 : at + header_size] = size.to_bytes(8, "big")[: header_size - 9]
    elif fault == "sizes-disagree":
        frame[-len(body) - 1] ^= 1
    elif fault == "size-turned":
        at = len(frame) - len(body) - header_size
        frame[at + 1 : at + 9] = frame[at + 1 : at + 9][::-1]
    elif fault == "checksum":
        frame[6:10] = crc32(body).to_bytes(4, "little")
    elif fault == "checksum-turned":
        frame[6:10] = frame[6:10][::-1]
    return bytes(frame)


def start() -> None:
    match fault:
        case "exit-at-start":
            raise SystemExit("no such model: large-3")
        case "print-at-start":
            os.write(1, b"Loading the model...\n")
        case "mark":
            os.write(1, b"\xef\xbb\xbf")
        case "blank-lines":
            os.write(1, b"\n\n")
        case "php-notice":
            os.write(1, b"\nDeprecated: Creation of dynamic property A::$b is deprecated in worker.php on line 3\n")
        case "hang-at-start":
            signal.pause()
        case "chatter":
            print("loaded the model\nready", file=sys.stderr)
        case _:
            pass


def answer(context: bytes, body: bytes, number: int) -> None:
    global kept, before
    match fault:
        case "print-in-job":
            os.write(1, b"got a job\n")
        case "hang":
            signal.pause()
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "close-stdout":
            os.close(1)
            signal.pause()
        case "text":
            body = body.decode("utf-8", "replace").encode()
        case "dies-of-binary":
            body.decode("utf-8")
        case "dies-of-empty":
            if not body:
                raise SystemExit(1)
        case "ends-on-empty":
            if not body:
                raise SystemExit(0)
        case "keeps-context":
            context = kept = context or kept
        case "one-behind":
            body, before = before or body, body
        case "half-a-frame":
            write(reply(context, body)[:5])
            return
        case "frame-of-another":
            write(encode_reply("goridge-1" if new else "goridge-3", b"ctx", body))
            return
        case _:
            pass
    if body == b"fail" and fault != "reply-for-error":
        write(encode_error(protocol, b"told to fail"))
        if fault == "reply-after-error":
            write(reply(b"", b"failed"))
        elif fault == "dies-after-error":
            raise SystemExit("a job failed")
        return
    write(reply(context, body))
    if fault == "two-answers":
        write(reply(context, body))
    elif fault == "print-after-answer":
        os.write(1, b"done\n")
    elif fault == "exit-after-job":
        raise SystemExit(0)


kept = before = b""


def main() -> None:
    start()
    number = 0
    while True:
        frame = next_frame()
        if frame is None:
            if fault == "ignore-end":
                time.sleep(1000)
            break
        kind, context, body = frame
        if kind == "job":
            number += 1
            answer(context, body, number)
        elif b"stop" in body:
            if fault == "ignore-stop":
                continue
            if fault == "stop-is-a-job":
                answer(b"", body, number)
                continue
            break
        elif fault == "bad-handshake":
            write(encode_control(protocol, b'{"id":1}'))
        else:
            write(encode_control(protocol, b'{"pid":%d}' % (1 if fault == "wrong-pid" else os.getpid())))
    if fault == "print-at-exit":
        os.write(1, b"bye\n")
    os.write(1, held)
    if fault == "status":
        raise SystemExit(3)


main()
