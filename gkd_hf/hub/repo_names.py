"""What a run's repos on the Hub are called; nothing heavy is imported here."""

from __future__ import annotations


def segmenter_repo(repo_id: str, source: str) -> str:
    """`org/gkd-x`, `toy_city:night` → `org/gkd-x-toy_city-night`: a domain's name may hold what a repo's may not."""
    allowed = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in source
    )
    return f"{repo_id}-{allowed}"
