"""A Hub on this machine alone, for the real clients: real HTTP, tokens with roles, commits, LFS, faults on demand.

To try things by hand: `python -m tests.hub.server --port 8080` prints what to export, and serves until Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qsl, urlsplit

from .api import Api, Request, Response, refusal, split_path
from .faults import Fault, Faults, flip_bit
from .repos import Repo

# What points a client somewhere else, or gives it a token that is not of this Hub.
CLIENT_SETTINGS = (
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_CACHE",
    "HF_XET_CACHE",
    "HF_ASSETS_CACHE",
    "HF_DATASETS_CACHE",
    "HF_MODULES_CACHE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HTTP_PROXY",
    "http_proxy",
    "ALL_PROXY",
    "all_proxy",
)


class LoopbackHub:
    """A Hub on 127.0.0.1, in threads of this process, from `with` to its end.

    Args:
        port: 0 picks a free one.
        orgs: where the write token may write.

    Attributes:
        url: for HF_ENDPOINT, or `HfApi(endpoint=…)`.
        write_token: may do everything in `orgs`. read_token: may only read.
        repos: (kind, "org/name") → `Repo`; kind is model, dataset or space.
        requests: (method, path, status) of everything answered; status 0 where the connection was dropped.
    """

    write_token = "hf_" + "W" * 34
    read_token = "hf_" + "R" * 34

    def __init__(self, port: int = 0, orgs: tuple[str, ...] = ("org", "tester")):
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        tokens = {self.write_token: "write", self.read_token: "read"}
        # Followed within a host, a redirect would lose the headers of the first answer: another name is needed.
        self._api = Api(self.url, f"http://localhost:{port}", tokens, orgs)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.requests: list[tuple[str, str, int]] = []
        self.faults = Faults()

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def repos(self) -> Mapping[tuple[str, str], Repo]:
        """All repositories."""
        return self._api.repos

    def environment(self, home: str | os.PathLike, token: str | None = write_token, **extra: str) -> dict[str, str]:
        """Environment of a process whose clients use this Hub, with their caches under `home`.

        Args:
            token: None for a user who has not logged in.
            extra: more variables.
        """
        environment = {key: value for key, value in os.environ.items() if key not in CLIENT_SETTINGS}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": os.fspath(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return environment | ({"HF_TOKEN": token} if token else {}) | extra

    def inject(
        self,
        fault: int | str,
        *,
        method: str | None = None,
        path: str = "",
        times: float = 1,
        after: int = 0,
        retry_after: int | None = 0,
        seconds: float = 1.0,
        whole: bool = False,
    ) -> None:
        """Let coming requests meet a fault; see `Fault`. `times=math.inf`: all of them."""
        self.faults.add(Fault(fault, method, path, times, after, retry_after, seconds, whole))

    def add_model(self, repo_id: str, files: Mapping[str, bytes] | str | os.PathLike, **settings: bool) -> Repo:
        """Put a model there without HTTP, or commit to it if it is there: files by path, or all of a folder.

        Args:
            settings: `private`, `gated`.
        """
        return self._add("model", repo_id, files, settings)

    def add_dataset(self, repo_id: str, files: Mapping[str, bytes] | str | os.PathLike, **settings: bool) -> Repo:
        """As `add_model`, a data set."""
        return self._add("dataset", repo_id, files, settings)

    def _add(
        self, kind: str, repo_id: str, files: Mapping[str, bytes] | str | os.PathLike, settings: dict[str, bool]
    ) -> Repo:
        if not isinstance(files, Mapping):
            folder = Path(files)
            found = (path for path in sorted(folder.rglob("*")) if path.is_file())
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
        repo = self._api.repos.setdefault((kind, repo_id), Repo(kind, repo_id))
        repo.private, repo.gated = settings.get("private", repo.private), settings.get("gated", repo.gated)
        repo.add_commit("add files", added=files)
        return repo

    def answer(self, request: Request) -> Response:
        """Answer a request that no fault keeps from being carried out."""
        return self._api.answer(request)


class _Handler(BaseHTTPRequestHandler):
    """Reads requests, and writes answers with the faults they meet."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:  # noqa: N802
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: `LoopbackHub.requests` remembers."""

    def _answer(self) -> None:
        hub: LoopbackHub = self.server.hub
        url = urlsplit(self.path)
        body = self._body()
        fault = hub.faults.strike(self.command, url.path, "Range" in self.headers)
        if fault is not None and isinstance(fault.kind, int):
            return self._send(url.path, refusal(fault.kind, fault.retry_after))
        response = hub.answer(
            Request(
                self.command,
                split_path(url.path),
                dict(parse_qsl(url.query)),
                body,
                self._token(),
                self.headers.get("Range"),
            )
        )
        if fault is not None and fault.kind == "delay":
            time.sleep(fault.seconds)
        if fault is not None and fault.kind == "flip":
            response.body = flip_bit(response.body)
        self._send(url.path, response, fault.kind if fault is not None else None)

    def _token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token or None if kind.lower() == "bearer" else None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _send(self, path: str, response: Response, fault: int | str | None = None) -> None:
        self.server.hub.requests.append((self.command, path, 0 if fault == "drop" else response.status))
        try:
            if fault == "drop":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Len")
                return self._hang_up()
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.body)))
            self.end_headers()
            if self.command != "HEAD":
                half = len(response.body) // 2 if fault == "truncate" else len(response.body)
                self.wfile.write(response.body[:half])
            if fault == "truncate":
                return self._hang_up()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def main(arguments: list[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="a Hub on this machine alone, kept in memory")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--read-only", action="store_true", help="print the token that may only read")
    parser.add_argument("--model", action="append", default=[], metavar="ID=FOLDER", help="a model to start with")
    parser.add_argument("--dataset", action="append", default=[], metavar="ID=FOLDER", help="a data set to start with")
    options = parser.parse_args(arguments)
    with LoopbackHub(options.port) as hub:
        for given, add in ((options.model, hub.add_model), (options.dataset, hub.add_dataset)):
            for entry in given:
                repo_id, _, folder = entry.partition("=")
                if not os.path.isdir(folder):
                    parser.error(f"'{entry}': '{folder}' is no folder")
                add(repo_id, folder)
        token = hub.read_token if options.read_only else hub.write_token
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={token} HF_HUB_DISABLE_XET=1 HF_HOME=$(mktemp -d)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.exit(0)


if __name__ == "__main__":
    main()
