"""Requests that no client should send, against a running server.

`python tests/serve/hostile_requests.py URL PID 10000 PHOTO` sends 10,000, with the memory of the server's process PID.
Each is a seeded choice, so that a run can be repeated. The server has to answer or to hang up in time, never with a
status of its own failure (500), and its memory must not grow from one half of the requests to the other.
"""

from __future__ import annotations

import random
import socket
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile import png_bomb

TIMEOUT = 60
PATHS = ("/embed", "/search", "/compare", "/identify", "/enrol")
TRAVERSALS = (
    "/../../etc/passwd", "/thumbs/../../etc/passwd", "//etc/passwd",
    "/thumbs/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/thumbs/L2V0Yy9wYXNzd2Q",
    "/thumbs/Li4vLi4vZXRjL3Bhc3N3ZA", "/%00", "/page.js/../../guard.py", "/thumbs/" + "A" * 5000,
)  # fmt: skip
BOMBS = [png_bomb(side) for side in (7000, 9000, 14000)]


def message(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = {"host": "localhost", "content-length": str(len(body)), "connection": "close"}
    lines.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def form(dice: random.Random, files: list[bytes], fields: dict[str, bytes]) -> tuple[bytes, str]:
    parts = [
        b'--b\r\ncontent-disposition: form-data; name="image"; filename="' + dice.randbytes(6) + b'"\r\n\r\n' + file
        for file in files
    ]
    parts += [
        b'--b\r\ncontent-disposition: form-data; name="' + name.encode() + b'"\r\n\r\n' + value
        for name, value in fields.items()
    ]
    return b"\r\n".join([*parts, b"--b--\r\n"]), "multipart/form-data; boundary=b"


def broken(dice: random.Random, photo: bytes) -> bytes:
    """A photo with a few bytes changed, or cut off."""
    content = bytearray(photo)
    for _ in range(dice.randint(1, 30)):
        content[dice.randrange(len(content))] = dice.randrange(256)
    return bytes(content[: dice.randint(1, len(content))] if dice.random() < 0.5 else content)


def fuzzed_photo(dice: random.Random, photo: bytes) -> bytes:
    return message("POST", dice.choice(PATHS), broken(dice, photo))


def noise(dice: random.Random, photo: bytes) -> bytes:
    return dice.randbytes(dice.randint(1, 4000))


def fuzzed_head(dice: random.Random, photo: bytes) -> bytes:
    content = bytearray(message("POST", dice.choice(PATHS), b"x" * 100))
    for _ in range(dice.randint(1, 8)):
        content[dice.randrange(len(content))] = dice.randrange(256)
    return bytes(content)


def fuzzed_form(dice: random.Random, photo: bytes) -> bytes:
    boxes = dice.choice([b"[[0,0,9,9]]", b"[[[", b"[null,null]", b"[[1e308,0,1,1]]", b"\xff\xfe", b"[" * 9000])
    body, kind = form(dice, [broken(dice, photo), photo], {"boxes": boxes, "name": dice.randbytes(9)})
    if dice.random() < 0.5:
        body = broken(dice, body)
    return message("POST", dice.choice(PATHS), body, content_type=kind)


def many_files(dice: random.Random, photo: bytes) -> bytes:
    body, kind = form(dice, [b"x"] * dice.randint(60, 300), {})
    return message("POST", "/embed", body, content_type=kind)


def bomb(dice: random.Random, photo: bytes) -> bytes:
    return message("POST", dice.choice(PATHS), dice.choice(BOMBS))


def traversal(dice: random.Random, photo: bytes) -> bytes:
    return message("GET", dice.choice(TRAVERSALS))


def odd_parameters(dice: random.Random, photo: bytes) -> bytes:
    query = dice.choice(["k=-1", "k=99999999999999999999", "camera=a", "camera=1" + "&camera=1" * 500, "far=nan",
                         "after=nan", "before=-inf", "boxes=[]", "boxes=%00", "%ff=%fe"])  # fmt: skip
    return message("POST", f"/search?{query}", photo)


def odd_arrays(dice: random.Random, photo: bytes) -> bytes:
    head = dice.choice(
        ["{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 96, 32, 3), }", "{'descr': '|O'}", "[" * 3000]
    )
    body = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + dice.randbytes(100)
    return message("POST", "/embed", body, content_type="application/x-npy")


def too_much(dice: random.Random, photo: bytes) -> bytes:
    return message("POST", "/embed", b"", content_length=str(dice.choice([33 << 20, 1 << 40])), expect="100-continue")


def early_end(dice: random.Random, photo: bytes) -> bytes:
    """Less than was promised, and then nothing (a slow loris, until the client hangs up)."""
    content = message("POST", "/embed", photo)
    return content[: dice.randrange(1, len(content))]


KINDS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    fuzzed_photo, noise, fuzzed_head, fuzzed_form, many_files, bomb, traversal, odd_parameters, odd_arrays, too_much,
    early_end,
)  # fmt: skip


def send(url: str, content: bytes, patient: bool) -> str:
    """The status, or what happened instead."""
    address = urlsplit(url)
    answer = b""
    try:
        with socket.create_connection((address.hostname, address.port), TIMEOUT) as connection:
            connection.sendall(content)
            connection.settimeout(TIMEOUT if patient else 0.05)
            while part := connection.recv(1 << 16):
                answer += part
    except TimeoutError:
        if patient:
            return "no answer"
    except OSError:
        pass
    return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "hung up"


def attack(url: str, photo: bytes, count: int, seed: int = 0, threads: int = 8) -> Counter[str]:
    """Send so many requests; how each ended, as "bomb 413"."""
    dice = random.Random(seed)

    def one(number: int) -> str:
        mine = random.Random(f"{seed} {number}")
        kind = KINDS[number % len(KINDS)]
        content = kind(mine, photo)
        # Whoever stops in the middle of a request waits for no answer, but for one in a hundred of them.
        patient = (kind is not early_end and kind is not fuzzed_head) or mine.random() < 0.01
        return f"{kind.__name__} {send(url, content, patient)}"

    numbers = list(range(count))
    dice.shuffle(numbers)
    with ThreadPoolExecutor(threads) as pool:
        return Counter(pool.map(one, numbers))


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    """Attack in ten parts, and print how they ended and the server's memory after each."""
    url, pid, count, photo = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]).read_bytes()
    total: Counter[str] = Counter()
    for part in range(10):
        total += attack(url, photo, count // 10, seed=part, threads=64)
        print(f"{(part + 1) * (count // 10)} requests, {resident_mib(pid):.0f} MiB", flush=True)
    for ending, times in sorted(total.items()):
        print(f"{times:6} {ending}")


if __name__ == "__main__":
    main()
