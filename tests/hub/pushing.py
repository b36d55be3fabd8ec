"""What the tests of pushing share: names, and what a Hub or a folder holds."""

from __future__ import annotations

from pathlib import Path

from tests.hub.server import LoopbackHub

ENCODER, SEGMENTER = "org/gkd-x", "org/gkd-x-toy_city"
CREATE, COMMIT = r"^/api/repos/create$", r"/commit/"


def own_commits(hub: LoopbackHub, repo_id: str) -> list:
    """The commits after the one that a new repo has."""
    repo = hub.repos.get(("model", repo_id))
    return [commit for commit in repo.commits if commit.summary.startswith("Upload")] if repo else []


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
