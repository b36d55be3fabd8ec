"""What a run's repos on the Hub are called; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gkd_hf.hub.short_paths import shortened


def segmenter_repo(repo_id: str, source: str) -> str:
    """`org/gkd-x`, `toy_city:night` → `org/gkd-x-toy_city-night`: a domain's name may hold what a repo's may not."""
    allowed = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in source
    )
    return f"{repo_id}-{allowed}"


@dataclass(frozen=True)
class RepoNames:
    """What a reader types to load the two artefacts: Hub ids, or folders where nothing was pushed."""

    encoder: str
    segmenter: str
    on_hub: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any], repo_id: str | None = None) -> RepoNames:
        """The names for `repo_id`; without one, the run's folders as the recipe has them."""
        if repo_id is None:
            folder = shortened(settings.get("output_dir") or ".")
            return cls(f"{folder}/encoder", f"{folder}/segmenter")
        task = (settings.get("stages") or {}).get("task")
        return cls(repo_id, segmenter_repo(repo_id, task["data"]) if task else "", on_hub=True)
