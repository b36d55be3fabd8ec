"""What was pushed from here before: the memory that tells a file of our own on the Hub from one of somebody else's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub.hf_api import RepoSibling

RECORD_NAME = "pushed.json"
_CHUNK = 1 << 20


class PushedRecord:
    """`pushed.json` beside the pushed folders: repo id → path within the repo → the names its content has on the Hub.

    Without it, as on another machine, nothing on the Hub counts as ours.

    Args:
        folder: the pushed folder. repo_id: where it goes.
    """

    def __init__(self, folder: Path, repo_id: str):
        self.path = folder.resolve().parent / RECORD_NAME
        self.repo_id = repo_id
        self.files: dict[str, list[str]] = self._all().get(repo_id, {})

    def knows(self, file: RepoSibling) -> bool:
        """Whether a file on the Hub is as we pushed it last."""
        return hub_name(file) in self.files.get(file.rfilename, ())

    def save(self, files: Mapping[str, Iterable[str]]) -> None:
        """Remember what is on the Hub now, path → `content_names`; raises `OSError` where that cannot be written."""
        self.files = {name: list(names) for name, names in files.items()}
        text = json.dumps(self._all() | {self.repo_id: self.files}, indent=2) + "\n"
        temporary = self.path.with_name(f".{RECORD_NAME}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path)

    def _all(self) -> dict[str, dict[str, list[str]]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # to know nothing is the safe side
        if not isinstance(content, dict):
            return {}
        return {repo_id: files for repo_id, files in content.items() if _is_record(files)}


def _is_record(files: object) -> bool:
    return isinstance(files, dict) and all(isinstance(names, list) for names in files.values())


def hub_name(file: RepoSibling) -> str | None:
    """The name that the Hub has for a file's content: its SHA-256 where it is in LFS, else that of its git blob."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def content_names(path: Path) -> tuple[str, str]:
    """The two names that a file's content can have on the Hub: that of its git blob, and its SHA-256."""
    git, plain = hashlib.sha1(b"blob %d\0" % path.stat().st_size), hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            git.update(chunk)
            plain.update(chunk)
    return git.hexdigest(), plain.hexdigest()
