"""What may reach the server as a file: pictures that a visitor sends, a limited number and size of them."""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from PIL import Image

from utils.dashboard.service import FORMATS
from utils.datasets.images import DECODE_ERRORS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEPT = 7200  # seconds until gradio deletes a file
ROUTE = "/upload"


@dataclass
class Quota:
    """Files and bytes that an address may have on the server at a time; thread-safe.

    Attributes:
        files: most files of one address; bytes: most bytes of one address.
        everyone: most bytes of all addresses, as a multiple of ``bytes``.
    """

    files: int = 100
    bytes: int = 400_000_000
    everyone: int = 10
    _kept: dict[str, deque[tuple[float, int]]] = field(default_factory=lambda: defaultdict(deque))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def admit(self, address: str, size: int) -> bool:
        """Whether a file of ``size`` bytes may come in; if so, it counts until it is deleted."""
        now = monotonic()
        with self._lock:
            for name, kept in list(self._kept.items()):
                while kept and now - kept[0][0] > KEPT:
                    kept.popleft()
                if not kept:
                    del self._kept[name]
            own = self._kept.get(address, ())
            total = sum(size for kept in self._kept.values() for _, size in kept)
            fits = len(own) < self.files and sum(size for _, size in own) + size <= self.bytes
            if fits and total + size <= self.everyone * self.bytes:
                self._kept[address].append((now, size))
                return True
        return False


class Uploads:
    """Middleware: an upload is one picture, announces its size, and is within the sender's quota.

    Others are refused: 411 without a size, 413 if larger than ``largest``, 429 above the quota. Files that are no
    pictures are deleted at once, and answered with 415. A visitor's page shows the answer's text.
    """

    def __init__(self, app: ASGIApp, quota: Quota, largest: int) -> None:
        self.app, self.quota, self.largest = app, quota, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith(ROUTE):
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"").decode()
        address = scope["client"][0] if scope["client"] else ""
        if not length.isdecimal():
            await refuse(send, 411, "the upload does not say how large it is (Content-Length)")
        elif int(length) > self.largest + 10_000:  # names and boundaries of the form
            await refuse(send, 413, f"the file has more than {self.largest / 1e6:g} MB; save it smaller")
        elif not self.quota.admit(address, int(length)):
            await refuse(send, 429, "too many pictures were sent from this address; try again in two hours")
        else:
            await self._check(scope, receive, send)

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets gradio store the file, and passes its answer (the paths) on if all of them are pictures."""
        start: Message = {}
        body = b""

        async def checked(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body", False):
                return
            paths = [Path(name) for name in json.loads(body)] if start["status"] == 200 else []
            if all(is_picture(path) for path in paths) and len(paths) <= 1:
                await send(start)
                await send({"type": "http.response.body", "body": body})
                return
            for path in paths:
                path.unlink(missing_ok=True)
            await refuse(send, 415, "the file is not a picture that can be read; use PNG, JPEG or WebP, one at a time")

        await self.app(scope, receive, checked)


def is_picture(path: Path) -> bool:
    """Whether a file's header is that of a picture in one of ``FORMATS``; nothing is decoded."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True  # refused with its size when it is opened
    except DECODE_ERRORS:
        return False


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answers a request with an error in plain text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
