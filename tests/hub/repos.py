"""The repositories of the loopback Hub: commits, branches, tags and files, as git and git LFS would name them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}

# What a new repo's .gitattributes sends to LFS, and what the Hub sends there because it is binary.
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".onnx", ".pt", ".pth", ".pkl", ".npz", ".arrow", ".zip", ".tar")
LFS_SIZE = 10 << 20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def git_oid(content: bytes) -> str:
    """Name that git gives a blob: the SHA-1 of its header and content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """Name that LFS gives a file."""
    return hashlib.sha256(content).hexdigest()


def lfs_pointer(content: bytes) -> bytes:
    """The text that git stores in place of a file in LFS."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
        sha256(content).encode(),
        len(content),
    )


def goes_to_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the Hub wants this file in LFS: by its suffix, its size, or because it is not text."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample)


@dataclass(frozen=True)
class Commit:
    """A state of a repo: all files, and which of them are in LFS."""

    oid: str
    summary: str
    files: Mapping[str, bytes]
    lfs: frozenset[str]
    date: str


@dataclass
class Repo:
    """A repository.

    Attributes:
        kind: model, dataset or space.
        id: org/name.
        gated: whether files may only be read with a token in `granted`.
        commits: of every branch, oldest first.
        branches: name → oid. tags: name → oid.
        details: what else creating it said, such as a Space's sdk.
    """

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: _now())

    @property
    def path(self) -> str:
        """Its path in URLs, without a leading slash."""
        return PREFIXES[self.kind] + self.id

    def commit(self, revision: str = "main") -> Commit | None:
        """The commit that a branch, tag or full or abbreviated oid names; None if there is none."""
        revision = revision.removeprefix("refs/heads/")
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        found = [commit for commit in self.commits if commit.oid == oid]
        if not found and re.fullmatch("[0-9a-f]{7,39}", oid):
            found = [commit for commit in self.commits if commit.oid.startswith(oid)]
        return found[0] if found else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """path → content at a revision; raises KeyError for an unknown one."""
        commit = self.commit(revision)
        if commit is None:
            raise KeyError(f"{self.id} has no revision {revision}")
        return dict(commit.files)

    def add_commit(
        self,
        summary: str,
        *,
        added: Mapping[str, bytes] | None = None,
        deleted: Iterable[str] = (),
        lfs: Iterable[str] | None = None,
        branch: str = "main",
    ) -> Commit:
        """Commit on top of a branch.

        Args:
            added: path → content, new or changed.
            deleted: paths that go.
            lfs: which of `added` are in LFS; None: those that the Hub would send there.
        """
        added = dict(added or {})
        parent = self.commit(branch) if branch in self.branches else None
        files = {path: data for path, data in (parent.files if parent else {}).items() if path not in set(deleted)}
        files |= added
        if lfs is None:
            lfs = (path for path, data in added.items() if goes_to_lfs(path, len(data), data[:512]))
        in_lfs = ((parent.lfs if parent else frozenset()) - set(added) | set(lfs)) & set(files)
        content = "".join(f"{path} {git_oid(data)}\n" for path, data in sorted(files.items()))
        identity = f"{self.path} {len(self.commits)} {parent.oid if parent else ''} {summary}\n{content}"
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), summary, files, in_lfs, _now())
        self.commits.append(commit)
        self.branches[branch] = commit.oid
        return commit

    def card(self, commit: Commit) -> dict[str, Any]:
        """The metadata at the top of README.md; empty where there is none or it is not YAML."""
        return read_card(commit.files.get("README.md", b"").decode(errors="replace"))[0]

    def info(self, commit: Commit, blobs: bool = False) -> dict[str, Any]:
        """What `/api/models/ID` says, with sizes and oids of the files if `blobs`."""
        card = self.card(commit)
        tags = [str(tag) for tag in card.get("tags") or []]
        return self.details | {
            "_id": git_oid(self.path.encode())[:24],
            "id": self.id,
            "author": self.id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": self.created,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "cardData": card,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "siblings": [self._sibling(commit, path, blobs) for path in sorted(commit.files)],
        }

    def _sibling(self, commit: Commit, path: str, blobs: bool) -> dict[str, Any]:
        if not blobs:
            return {"rfilename": path}
        entry = self.entry(commit, path)
        lfs = {"sha256" if key == "oid" else key: value for key, value in entry.get("lfs", {}).items()}
        return {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]} | ({"lfs": lfs} if lfs else {})

    def entry(self, commit: Commit, path: str, expand: bool = False) -> dict[str, Any]:
        """What a listing says of a file."""
        content = commit.files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path in commit.lfs:
            pointer = lfs_pointer(content)
            entry |= {"oid": git_oid(pointer)}
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
        return entry | (_last_commit(commit) if expand else {})

    def tree(self, commit: Commit, folder: str, recursive: bool, expand: bool) -> list[dict[str, Any]] | None:
        """Files and folders below a folder; None if there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        inside = sorted(path for path in commit.files if path.startswith(prefix))
        if folder and not inside:
            return None
        folders = {
            prefix + "/".join(parts[: depth + 1])
            for parts in (path.removeprefix(prefix).split("/") for path in inside)
            for depth in range(len(parts) - 1)
        }
        entries = [{"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())} for path in folders]
        entries = [entry | (_last_commit(commit) if expand else {}) for entry in entries]
        entries += [self.entry(commit, path, expand) for path in inside]
        if not recursive:
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        return sorted(entries, key=lambda entry: entry["path"])

    def blobs(self) -> Iterable[bytes]:
        """Contents of all LFS files of all commits."""
        return (commit.files[path] for commit in self.commits for path in commit.lfs)


def read_card(text: str) -> tuple[dict[str, Any], str | None]:
    """The metadata of a card, and what is wrong with it (None if nothing is)."""
    found = re.match(r"\s*---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    if found is None:
        return {}, None
    try:
        card = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        return {}, f"the metadata is not YAML: {error}"
    if card is None:
        return {}, None
    if not isinstance(card, dict):
        return {}, "the metadata must be a mapping"
    return card, None


def _last_commit(commit: Commit) -> dict[str, Any]:
    return {"lastCommit": {"id": commit.oid, "title": commit.summary, "date": commit.date}}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
