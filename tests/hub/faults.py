"""What can go wrong between the Hub and its client, to be injected into the loopback Hub's answers."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass

REASONS = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you are not allowed to do this",
    404: "Repository not found",
    412: "A commit has happened since. Please refresh and try again.",
    429: "We had to rate limit you",
    503: "Service Unavailable",
}
MANGLED = ("drop", "truncate", "flip", "delay")


@dataclass
class Fault:
    """One injected fault.

    Attributes:
        kind: a status of `REASONS`, answered instead of doing what was asked; or, of an answer whose request was
            carried out: `drop` (the connection closes within the headers), `truncate` (it closes in the middle of the
            body), `flip` (one bit of the body is another), `delay` (it comes `seconds` later).
        method: only requests with this method; None: any.
        path: regular expression, searched for in the request's path.
        times: how many requests it strikes.
        after: how many matching requests it lets pass first.
        retry_after: seconds in the Retry-After header of 429 and 503; None: no such header.
        seconds: of `delay`.
        whole: only requests for whole files, or for what has no parts; False: any.
    """

    kind: int | str
    method: str | None
    path: str
    times: float
    after: int
    retry_after: int | None
    seconds: float
    whole: bool

    def __post_init__(self) -> None:
        if self.kind not in REASONS and self.kind not in MANGLED:
            raise ValueError(f"unknown fault {self.kind!r} (there are {[*REASONS, *MANGLED]})")

    def matches(self, method: str, path: str, part: bool) -> bool:
        """Whether it concerns this request, which may be for a part of a file."""
        return not (self.whole and part) and self.method in (None, method) and re.search(self.path, path) is not None


class Faults:
    """The faults that are still to strike. Safe to use from several threads."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        """Let it strike from now on."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Let nothing strike any more."""
        with self._lock:
            self._faults.clear()

    def left(self) -> list[Fault]:
        """Those that have not struck as often as they should."""
        with self._lock:
            return [fault for fault in self._faults if 0 < fault.times < math.inf]

    def strike(self, method: str, path: str, part: bool) -> Fault | None:
        """The fault that this request meets; the one that was injected first, if several match."""
        with self._lock:
            for fault in self._faults:
                if fault.times <= 0 or not fault.matches(method, path, part):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None


def flip_bit(body: bytes) -> bytes:
    """The body with one bit in its middle changed."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body
