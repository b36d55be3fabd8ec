"""Push a prepared data set to the Hub: verified first, one commit, with patience for trouble."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from gkd_hf.data.manifest import MANIFEST, Manifest, verify
from gkd_hf.errors import InputError
from gkd_hf.hub.upload import check_no_tokens, check_repo_id, patiently, tell, usable_token

_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.parquet")


def push_data_set(
    folder: str | os.PathLike, repo_id: str, *, private: bool = True, token: str | None = None, progress: bool = False
) -> str:
    """Upload the shards, the card and the manifest of a prepared folder as one commit; none if nothing changed.

    Shards of an earlier preparation that this one no longer has are deleted in the same commit. A repo that holds
    another data set is left alone; the visibility of one that exists stays as it is.

    Args:
        folder: from ``gkd_hf.data.prepare``. repo_id: org/name.
        private: whether a new repo is private, as the terms of most data sets demand.
        token: None takes HF_TOKEN or what ``hf auth login`` stored.

    Returns:
        URL of the data set.

    Raises:
        InputError: a folder that `verify` finds wrong, a repo of something else, and what the Hub refuses.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    token = usable_token(token)
    wrong = verify(folder, progress=progress)
    manifest = Manifest.read(folder)
    if wrong or manifest is None:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{folder} is not pushed: {wrong[0]}{more}")
    names = [shard.name for shard in manifest.shards] + ["README.md", MANIFEST]
    if not (folder / "README.md").is_file():
        raise InputError(f"{folder} has no README.md: prepare the data set again, which writes it")
    check_no_tokens(folder, ["README.md", MANIFEST], token)
    api = HfApi(token=token, library_name="gkd_hf")
    url = patiently(repo_id, lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True))

    def commit() -> tuple[bool, bool]:
        info = api.dataset_info(repo_id)
        there = {file.rfilename for file in info.siblings or []}
        if MANIFEST not in there and any(name.endswith(".parquet") for name in there):
            raise InputError(f"{repo_id} holds another data set, not one prepared here: choose another name")
        # New ones for every attempt: the client keeps in them what it has sent.
        operations = [CommitOperationAdd(name, str(folder / name)) for name in names]
        gone = sorted(name for name in there if _SHARD.fullmatch(name) and name not in names)
        operations += [CommitOperationDelete(name) for name in gone]
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Upload {manifest.domain}, prepared by gkd_hf",
            repo_type="dataset",
            parent_commit=info.sha,
        )
        return done.oid != info.sha, bool(info.private)

    changed, is_private = patiently(repo_id, commit)
    if is_private != private:
        is_, asked = ("private", "public") if is_private else ("public", "private")
        tell(f"{repo_id} exists and stays {is_}; make it {asked} on {url}/settings")
    tell(f"{url}: {'uploaded' if changed else 'unchanged'}")
    return str(url)
