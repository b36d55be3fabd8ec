"""What the loopback Hub answers: the requests of the Hub's clients, carried out on repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from .faults import REASONS
from .repos import GIT_ATTRIBUTES, KINDS, PREFIXES, Commit, Repo, git_oid, goes_to_lfs, read_card, sha256


@dataclass
class Request:
    """A request; `segments` are the parts of its path, unquoted. `token` is None if none was sent."""

    method: str
    segments: list[str]
    query: dict[str, str]
    body: bytes
    token: str | None
    range: str | None = None

    def json(self) -> dict[str, Any]:
        """The body, read as JSON, or as a form, which the Hub also takes."""
        if self.body[:1] == b"{":
            return json.loads(self.body)
        form = parse_qs(self.body.decode())
        return {key: values if key == "paths" else values[0] for key, values in form.items()}

    def flag(self, name: str) -> bool:
        """A boolean of the query."""
        return self.query.get(name, "").lower() in ("1", "true")


@dataclass
class Response:
    """An answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> Response:
        """An answer in JSON."""
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | headers)


class Refusal(Exception):
    """Something that is answered with an error, as the Hub words it in headers and body."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.response = Response.json({"error": message}, status, **named, **headers)


def refusal(status: int, retry_after: int | None) -> Response:
    """The answer of an injected status."""
    headers = {"Retry-After": str(retry_after)} if status in (429, 503) and retry_after is not None else {}
    return Refusal(status, REASONS[status], "RepoNotFound" if status == 404 else None, **headers).response


class Api:
    """The Hub's HTTP interface.

    Args:
        url: of the Hub itself.
        storage_url: of the same server under another host name, where LFS files are, as the Hub's are on a CDN.
        tokens: token → role, `write` or `read`.
        orgs: where a write token may write.
    """

    def __init__(self, url: str, storage_url: str, tokens: dict[str, str], orgs: tuple[str, ...]):
        self.url, self.storage_url, self.tokens, self.orgs = url, storage_url, tokens, orgs
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self._secret = hashlib.sha256(url.encode()).hexdigest()

    def answer(self, request: Request) -> Response:
        """Carry out a request; one at a time."""
        with self._lock:
            try:
                return self._route(request)
            except Refusal as refused:
                return refused.response

    def _route(self, request: Request) -> Response:
        method, parts = request.method, request.segments
        reading = method in ("GET", "HEAD")
        if parts[:1] == ["storage"] and len(parts) == 2:
            return self._storage(request, parts[1])
        if request.token is not None and request.token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        match parts:
            case ["api", "whoami-v2"] if reading:
                return self._whoami(request)
            case ["api", "repos", "create"] if method == "POST":
                return self._create(request)
            case ["api", "repos", "delete"] if method == "DELETE":
                return self._delete(request)
            case ["api", "validate-yaml"] if method == "POST":
                wrong = read_card(request.json()["content"])[1]
                errors = [{"message": wrong}] if wrong else []
                return Response.json({"errors": errors, "warnings": []}, 400 if errors else 200)
            case ["api", kinds] if kinds in KINDS and reading:
                return Response.json(self._list(request, KINDS[kinds]))
            case ["api", kinds, org, name, *rest] if kinds in KINDS:
                return self._api_repo(request, self._repo(request, KINDS[kinds], f"{org}/{name}"), rest)
            case [("datasets" | "spaces") as kinds, org, name, *rest]:
                return self._plain_repo(request, KINDS[kinds], f"{org}/{name}", rest)
            case [org, name, *rest]:
                return self._plain_repo(request, "model", f"{org}/{name}", rest)
        raise Refusal(404, "Not Found")

    # -- who may do what ----------------------------------------------------------------------------------------------

    def _repo(self, request: Request, kind: str, repo_id: str) -> Repo:
        """The repo, if this token may know of it; anonymous users are told the same of missing and private ones."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and request.token is None):
            anonymous = request.token is None
            message = "Invalid username or password." if anonymous else "Repository not found"
            raise Refusal(401 if anonymous else 404, message, "RepoNotFound")
        return repo

    def _may_write(self, request: Request, repo_id: str) -> None:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = repo_id.split("/")[0]
        if self.tokens[request.token] != "write":
            raise Refusal(403, f"you must use a write token to change {repo_id}")
        if namespace not in self.orgs:
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def _whoami(self, request: Request) -> Response:
        if request.token is None:
            raise Refusal(401, "Invalid username or password.")
        role = self.tokens[request.token]
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in self.orgs]
        access = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
        return Response.json({"type": "user", "id": "1", "name": "tester", "orgs": orgs, "auth": access})

    # -- repositories -------------------------------------------------------------------------------------------------

    def _named(self, request: Request) -> tuple[str, str, dict[str, Any]]:
        asked = request.json()
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        self._may_write(request, repo_id)
        return asked.get("type") or "model", repo_id, asked

    def _create(self, request: Request) -> Response:
        kind, repo_id, asked = self._named(request)
        url = f"{self.url}/{PREFIXES[kind]}{repo_id}"
        if (kind, repo_id) in self.repos:
            return Response.json({"error": "You already created this repo", "url": url}, 409)
        repo = Repo(kind, repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        if "sdk" in asked:
            repo.details["sdk"] = asked["sdk"]
        repo.add_commit("initial commit", added={".gitattributes": GIT_ATTRIBUTES})
        self.repos[kind, repo_id] = repo
        return Response.json({"url": url, "name": repo_id, "id": repo_id})

    def _list(self, request: Request, kind: str) -> list[dict[str, Any]]:
        author = request.query.get("author")
        seen = [repo for key, repo in sorted(self.repos.items()) if key[0] == kind]
        seen = [repo for repo in seen if author in (None, repo.id.split("/")[0])]
        return [repo.info(repo.commit()) for repo in seen if request.token is not None or not repo.private]

    def _delete(self, request: Request) -> Response:
        kind, repo_id, _ = self._named(request)
        if self.repos.pop((kind, repo_id), None) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return Response()

    def _api_repo(self, request: Request, repo: Repo, rest: list[str]) -> Response:
        method = request.method
        if method not in ("GET", "HEAD") and rest[:1] != ["paths-info"]:
            self._may_write(request, repo.id)
        match method, rest:
            case "GET", [] | ["revision", _]:
                return Response.json(repo.info(self._commit(repo, rest[1] if rest else "main"), request.flag("blobs")))
            case "GET", ["tree", revision, *folders]:
                commit, folder = self._commit(repo, revision), "/".join(folders)
                tree = repo.tree(commit, folder, request.flag("recursive"), request.flag("expand"))
                if tree is None:
                    raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
                return Response.json(tree)
            case "POST", ["paths-info", revision]:
                commit, asked = self._commit(repo, revision), request.json()
                whole = {entry["path"]: entry for entry in repo.tree(commit, "", True, True)}
                return Response.json([whole[path] for path in asked["paths"] if path in whole])
            case "GET", ["commits", revision]:
                return Response.json(self._history(repo, self._commit(repo, revision)))
            case "GET", ["refs"]:
                return Response.json(
                    {
                        "branches": _refs("heads", repo.branches),
                        "tags": _refs("tags", repo.tags),
                        "converts": [],
                    }
                )
            case "GET", ["auth-check"]:
                self._check_gate(request, repo)
                return Response.json({})
            case "PUT", ["settings"]:
                asked = request.json()
                repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
                repo.gated = bool(asked.get("gated", repo.gated))
                return Response.json({})
            case _, [("tag" | "branch") as kind, name]:
                return self._change_refs(request, repo, kind, name)
            case "POST", ["preupload", revision]:
                return self._preupload(request, repo, revision)
            case "POST", ["commit", revision]:
                return self._take_commit(request, repo, revision)
        raise Refusal(404, "Not Found")

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.commit(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _history(self, repo: Repo, last: Commit) -> list[dict[str, Any]]:
        until = repo.commits[: repo.commits.index(last) + 1]
        return [
            {"id": each.oid, "title": each.summary, "message": "", "date": each.date, "authors": [{"user": "tester"}]}
            for each in reversed(until)
        ]

    def _change_refs(self, request: Request, repo: Repo, kind: str, name: str) -> Response:
        refs = repo.tags if kind == "tag" else repo.branches
        if request.method == "DELETE":
            if refs.pop(name, None) is None:
                raise Refusal(404, f"there is no {kind} {name}", "RevisionNotFound")
            return Response()
        asked = request.json() if request.body else {}
        # A tag's own name is in the body, the revision it is put on in the path.
        new, start = (asked["tag"], name) if kind == "tag" else (name, asked.get("startingPoint", "main"))
        if new in refs:
            raise Refusal(409, f"{kind} {new} exists already")
        refs[new] = self._commit(repo, start).oid
        return Response.json({})

    # -- uploads ------------------------------------------------------------------------------------------------------

    def _preupload(self, request: Request, repo: Repo, revision: str) -> Response:
        commit, answers = self._commit(repo, revision), []
        for asked in request.json()["files"]:
            path = asked["path"]
            lfs = goes_to_lfs(path, asked["size"], base64.b64decode(asked["sample"]))
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in commit.files:
                content = commit.files[path]
                answer["oid"] = sha256(content) if lfs else git_oid(content)
            answers.append(answer)
        return Response.json({"files": answers})

    def _lfs_batch(self, request: Request, repo: Repo) -> Response:
        self._may_write(request, repo.id)
        objects = []
        for asked in request.json()["objects"]:
            known = {"oid": asked["oid"], "size": asked["size"]}
            if self._stored(asked["oid"]) is None:
                known["actions"] = {"upload": {"href": self._storage_href(asked["oid"])}}
            objects.append(known)
        return Response.json({"transfer": "basic", "objects": objects})

    def _take_commit(self, request: Request, repo: Repo, revision: str) -> Response:
        head = self._commit(repo, revision)
        header: dict[str, Any] = {}
        added: dict[str, bytes] = {}
        deleted: set[str] = set()
        lfs: set[str] = set()
        for line in request.body.splitlines():
            item = json.loads(line)
            value, path = item["value"], item["value"].get("path", "")
            match item["key"]:
                case "header":
                    header = value
                case "file":
                    added[path] = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self._stored(value["oid"])
                    if content is None:
                        raise Refusal(400, f"{path}: LFS object {value['oid']} was not uploaded")
                    added[path] = content
                    lfs.add(path)
                case "deletedFile":
                    deleted.add(path)
                case "deletedFolder":
                    deleted |= {each for each in head.files if each.startswith(path.rstrip("/") + "/")}
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, REASONS[412])
        commit = repo.add_commit(header["summary"], added=added, deleted=deleted, lfs=lfs, branch=revision)
        url = f"{self.url}/{repo.path}/commit/{commit.oid}"
        return Response.json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    # -- downloads ----------------------------------------------------------------------------------------------------

    def _plain_repo(self, request: Request, kind: str, repo_id: str, rest: list[str]) -> Response:
        if rest == ["info", "lfs", "objects", "batch"] and repo_id.endswith(".git") and request.method == "POST":
            return self._lfs_batch(request, self._repo(request, kind, repo_id.removesuffix(".git")))
        if request.method not in ("GET", "HEAD"):
            raise Refusal(404, "Not Found")
        repo = self._repo(request, kind, repo_id)
        match rest:
            case []:
                return Response(200, f"<h1>{repo.id}</h1>".encode(), {"Content-Type": "text/html"})
            case [("resolve" | "raw") as how, revision, *path]:
                self._check_gate(request, repo)
                return self._file(request, repo, self._commit(repo, revision), "/".join(path), how == "raw")
        raise Refusal(404, "Not Found")

    def _check_gate(self, request: Request, repo: Repo) -> None:
        if repo.gated and request.token not in repo.granted:
            message = f"Access to {repo.kind} {repo.id} is restricted and you are not in the authorized list."
            raise Refusal(401 if request.token is None else 403, message, "GatedRepo")

    def _file(self, request: Request, repo: Repo, commit: Commit, path: str, raw: bool) -> Response:
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        content = commit.files[path]
        if path not in commit.lfs or raw:
            return _ranged(request, content, headers | {"ETag": f'"{git_oid(content)}"'})
        oid = sha256(content)
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "ETag": f'"{git_oid(content)}"'}
        return Response(302, b"", headers | {"Location": self._storage_href(oid)})

    def _storage_href(self, oid: str) -> str:
        return f"{self.storage_url}/storage/{oid}?signature={self._signature(oid)}"

    def _signature(self, oid: str) -> str:
        return hashlib.sha256(f"{self._secret} {oid}".encode()).hexdigest()[:32]

    def _stored(self, oid: str) -> bytes | None:
        if oid in self.uploads:
            return self.uploads[oid]
        blobs = (blob for repo in self.repos.values() for blob in repo.blobs())
        return next((blob for blob in blobs if sha256(blob) == oid), None)

    def _storage(self, request: Request, oid: str) -> Response:
        """The CDN: signed links instead of tokens. A token that reaches it has leaked, and is refused."""
        if request.token is not None:
            raise Refusal(400, "a token was sent to the storage host")
        if request.query.get("signature") != self._signature(oid):
            raise Refusal(403, "the link is not signed")
        if request.method == "PUT":
            if sha256(request.body) != oid:
                raise Refusal(400, "the content is not what the LFS oid says")
            self.uploads[oid] = request.body
            return Response(200, b"", {"ETag": f'"{oid}"'})
        content = self._stored(oid)
        if content is None:
            raise Refusal(404, "no such object")
        return _ranged(request, content, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    headers = {"Content-Type": "application/octet-stream"} | headers
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or "")
    if found is None or found.group(0) == "bytes=-":
        return Response(200, content, headers)
    first, last = found.groups()
    begin = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) if first and last else len(content) - 1, len(content) - 1)
    if begin > end:
        return Response(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[begin : end + 1], headers | {"Content-Range": f"bytes {begin}-{end}/{len(content)}"})


def _refs(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]


def split_path(path: str) -> list[str]:
    """The parts of a URL's path. A quoted slash stays within its part: `refs%2Fconvert` is one revision."""
    return [unquote(part) for part in path.split("/") if part]
