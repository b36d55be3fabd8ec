"""Files from the Hub, fetched with care: retried, checked against their hashes, explained where they cannot be had.

The Hub's client checks sizes only. Here a file is used once its content has the hash that the Hub names it by, and
what goes wrong on the way ends in one `InputError` that says what to do.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the base of all errors of whichever HTTP library the client uses
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, filter_repo_objects

from .errors import InputError

CONFIGURATION = ("config.json", "preprocessor_config.json")
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

TRIES = 4
FIRST_WAIT = 1.0  # seconds; doubled after every try
LONGEST_WAIT = 120.0  # seconds, of all waits together
TRANSIENT = (408, 429, 500, 502, 503, 504)

Kind = Literal["model", "dataset"]
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class _Unsettled(Exception):
    """The client fell back on something in its cache that may be incomplete or out of date."""


def pull(repo_id: str, patterns: Sequence[str], *, revision: str | None = None, kind: Kind = "model") -> Path:
    """Return the folder of the cache that holds a repo's files, each verified against its hash.

    The folder's name is the commit that the revision stood for. Where the Hub cannot be reached even after some
    tries, or HF_HUB_OFFLINE is set, it is what the cache holds; then too only if everything is there.
    Any number of processes may pull the same files at once: one fetches, each verifies.

    Args:
        repo_id: Hub id.
        patterns: which files, as `huggingface_hub.snapshot_download` takes them; those that do not exist are not
            missed.
        revision: commit, tag or branch; None: main.
        kind: what `repo_id` is the id of.

    Raises:
        InputError: no such repo or revision, no access, no connection and nothing in the cache, or content that is
            still damaged after it was fetched again.
    """
    repo = _Repo(repo_id, kind)
    for attempt in range(2):
        folder = _fetch(repo, patterns, revision)
        damaged = [path for path in _files(repo, folder, patterns) if not _verified(repo, folder, path)]
        if not damaged:
            return folder
        names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
        for path in damaged:
            _discard(repo, folder, path)
        logger.warning("%s of '%s' came damaged (another hash than the Hub's); removed", names, repo_id)
        if constants.is_offline_mode():
            raise InputError(
                f"{names} of '{repo_id}' is damaged in the cache (its content has another hash than the Hub gives); "
                "it was removed. Unset HF_HUB_OFFLINE and start again to fetch it"
            )
        if attempt == 1:
            raise InputError(
                f"{names} of '{repo_id}' came damaged twice: its content has another hash than {_page(repo_id, kind)} "
                "gives. It is not used, and was removed from the cache; try again, over another connection or "
                "without a proxy in between"
            )
    raise AssertionError("not reached")


def pull_file(repo_id: str, name: str, *, commit: str, kind: Kind = "model") -> Path:
    """Return one file of a commit in the cache, verified against its hash; fetched only if it is not there yet.

    Args:
        repo_id, kind: as `pull`.
        name: path within the repo.
        commit: full hash, as the folder's name that `pull` returned.

    Raises:
        InputError: as `pull`, and no such file.
    """
    repo = _Repo(repo_id, kind)
    cached = try_to_load_from_cache(repo_id, name, revision=commit, repo_type=kind)
    if isinstance(cached, str):
        folder = Path(cached[: -len(name)])
        if _verified(repo, folder, Path(cached)):
            return Path(cached)
    # What a bracket or star in the name would stand for is not meant.
    path = pull(repo_id, [glob.escape(name)], revision=commit, kind=kind) / name
    if not path.is_file():
        raise InputError(f"'{repo_id}' lacks {name} at commit {commit}, see {_page(repo_id, kind)}/tree/{commit}")
    return path


def listed_files(repo_id: str, commit: str, *, kind: Kind = "model") -> list[str] | None:
    """Names of all files of a commit that was pulled; None if only their presence in the cache is known."""
    try:
        return [entry.path for entry in get_cached_repo_tree(repo_id, repo_type=kind, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return None


def pulled_commit(repo_id: str, revision: str | None = None, *, kind: Kind = "model") -> str | None:
    """The commit that a repo's revision stood for when it was last pulled, without asking the Hub.

    None if it was never pulled: a folder, or `toy`.
    """
    if os.path.isdir(repo_id):
        return None
    try:
        folder = snapshot_download(
            repo_id, repo_type=kind, revision=revision, local_files_only=True, allow_patterns=[]
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(folder).name


def with_retries(action: Callable[[], Result], what: str) -> Result:
    """Return what ``action`` returns; try again, ever later, while the Hub is busy or the connection fails.

    A busy Hub's own wish (Retry-After) is honoured. At most `TRIES` tries and `LONGEST_WAIT` seconds of waiting.

    Args:
        what: named in the log.

    Raises:
        Exception: what the last try raised, or the first that another try would not help.
    """
    waited, wait = 0.0, FIRST_WAIT
    for left in reversed(range(TRIES)):
        try:
            return action()
        except Exception as error:
            seconds = max(wait, _retry_after(error))
            if left == 0 or not is_transient(error) or waited + seconds > LONGEST_WAIT:
                raise
            logger.warning("%s: %s; trying again in %g s", what, _reason(error), seconds)
        time.sleep(seconds)
        waited, wait = waited + seconds, 2 * wait
    raise AssertionError("not reached")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed later."""
    if constants.is_offline_mode():
        return False
    for each in _chain(error):
        if isinstance(each, HfHubHTTPError):
            return each.response.status_code in TRANSIENT
        if isinstance(each, _Unsettled | HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError):
            return True
        if type(each) is OSError and each.errno is None:
            return True  # how the client says that a file came with another size
    return False


def hub_error(error: BaseException, repo_id: str, *, kind: Kind = "model", revision: str | None = None) -> InputError:
    """The explanation of what a Hub client raised, however deep a library has wrapped it."""
    page, at = _page(repo_id, kind), f" at revision '{revision}'" if revision else ""
    log_in, offline = "log in with `hf auth login` or set HF_TOKEN", constants.is_offline_mode()
    for each in _chain(error):
        if isinstance(each, GatedRepoError):
            return InputError(f"'{repo_id}' is gated: ask for access on {page}, then {log_in}, and start again")
        if isinstance(each, DisabledRepoError):
            return InputError(f"'{repo_id}' was disabled on the Hub, see {page}: use another one")
        if isinstance(each, RepositoryNotFoundError):
            return InputError(
                f"there is no {_noun(kind)} '{repo_id}' on the Hub, or it is private: check the name on {page}; if "
                f"the page asks for it, {log_in}"
            )
        if isinstance(each, RevisionNotFoundError):
            return InputError(
                f"'{repo_id}' has no revision '{revision or 'main'}': {page}/commits/main lists its commits, and its "
                "branches and tags are in the menu there"
            )
        if isinstance(each, RemoteEntryNotFoundError):
            return InputError(f"'{repo_id}'{at} lacks a file that is needed, see {page}/tree/{revision or 'main'}")
        if isinstance(each, LocalEntryNotFoundError | ConnectionError) and offline:
            return _not_cached(repo_id, kind, at)
        if isinstance(each, HfHubHTTPError):
            return _refused(each, repo_id, kind, log_in)
        if isinstance(each, FileMetadataError):
            return InputError(
                f"{constants.ENDPOINT} does not answer as the Hub does when asked for '{repo_id}': check HF_ENDPOINT "
                "and the proxy"
            )
        if isinstance(each, HFValidationError):
            return InputError(f"'{repo_id}' is neither a folder here nor a Hub id such as org/name")
        if isinstance(each, HTTPError | ConnectionError | TimeoutError):
            return InputError(
                f"cannot reach {page} ({_reason(each)}), and it is not (or not whole) in the cache: check the "
                "connection, or give a folder"
            )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"cannot read '{repo_id}'{at} from {page}: {reason}")


@dataclass(frozen=True)
class _Repo:
    """What is pulled from."""

    id: str
    kind: Kind

    def snapshot(self, patterns: Sequence[str], revision: str | None, *, local: bool) -> Path:
        """Its folder in the cache, the files fetched unless ``local``."""
        return Path(
            snapshot_download(
                self.id,
                repo_type=self.kind,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=local,
            )
        )

    def listed(self, commit: str) -> list[str] | None:
        """`listed_files`."""
        return listed_files(self.id, commit, kind=self.kind)


def _fetch(repo: _Repo, patterns: Sequence[str], revision: str | None) -> Path:
    try:
        if constants.is_offline_mode():
            return repo.snapshot(patterns, revision, local=True)
        try:
            return with_retries(lambda: _fetch_once(repo, patterns, revision), f"fetching '{repo.id}'")
        except Exception as error:
            if not is_transient(error):
                raise
            try:
                folder = repo.snapshot(patterns, revision, local=True)
            except LocalEntryNotFoundError:
                raise error from None
            logger.warning(
                "the Hub cannot be reached (%s): '%s' is taken from the cache, commit %s",
                _reason(error),
                repo.id,
                folder.name,
            )
            return folder
    except (HTTPError, OSError, EntryNotFoundError, HFValidationError, ValueError, _Unsettled) as error:
        raise hub_error(error, repo.id, kind=repo.kind, revision=revision) from error


def _fetch_once(repo: _Repo, patterns: Sequence[str], revision: str | None) -> Path:
    commit = revision
    if revision is None or not _is_commit(revision) or repo.listed(revision) is None:
        # Where this fails, snapshot_download would silently go on with what its cache holds.
        commit = HfApi().repo_info(repo.id, repo_type=repo.kind, revision=revision).sha
    folder = repo.snapshot(patterns, revision, local=False)
    if folder.name != commit or repo.listed(commit) is None:
        raise _Unsettled(f"the Hub did not list the files of '{repo.id}'")
    return folder


def _files(repo: _Repo, folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that were meant. Another process may just have removed one as damaged: it is named all the same."""
    listed = repo.listed(folder.name)
    if listed is None:
        return [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [folder / name for name in filter_repo_objects(listed, allow_patterns=list(patterns))]


_seen_whole: set[tuple[str, int, int]] = set()


def _verified(repo: _Repo, folder: Path, path: Path) -> bool:
    """Whether a file has the content that the Hub says: by its entry in the listing, or its blob's name."""
    try:
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns)
        if key in _seen_whole:
            return True
        # The client names a blob by its ETag: the SHA-256 of an LFS file, git's SHA-1 of any other. Where there are
        # no links, or the ETag came damaged, there is still the listing: there an LFS file has the SHA-1 of its
        # pointer.
        expected = {Path(os.readlink(path)).name} if path.is_symlink() else set()
        names = _names(path, state.st_size)
    except FileNotFoundError:
        return False  # another process has found it damaged
    try:
        name = path.relative_to(folder).as_posix()
        tree = get_cached_repo_tree(repo.id, repo_type=repo.kind, revision=folder.name)
        expected |= {entry.blob_id for entry in tree if entry.path == name}
    except CachedRepoTreeNotFoundError:
        pass
    if not expected & names:
        return False
    _seen_whole.add(key)
    return True


def _names(path: Path, size: int) -> set[str]:
    """All names that git and LFS give this content."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256.hexdigest()}\nsize {size}\n".encode()
    pointer_blob = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer, usedforsecurity=False)
    return {sha256.hexdigest(), blob.hexdigest(), pointer_blob.hexdigest()}


def _discard(repo: _Repo, folder: Path, path: Path) -> None:
    """Remove a damaged file, unless another process has already put a good one into its place."""
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / f"{repo.kind}s--{repo.id.replace('/', '--')}" / "damaged.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not _verified(repo, folder, path):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file of a snapshot, and the blob behind it, which the client would link again."""
    for each in [os.path.realpath(path), *([path.parent / os.readlink(path)] if path.is_symlink() else []), path]:
        Path(each).unlink(missing_ok=True)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came of, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # Libraries write `from None` and still keep what they had caught.
        error = error.__cause__ or error.__context__


def _retry_after(error: BaseException) -> float:
    for each in _chain(error):
        if isinstance(each, HfHubHTTPError):
            given = each.response.headers.get("Retry-After", "").strip()
            return float(given) if given.isdigit() else 0.0
    return 0.0


def _refused(error: HfHubHTTPError, repo_id: str, kind: Kind, log_in: str) -> InputError:
    status, page = error.response.status_code, _page(repo_id, kind)
    if status in (401, 403):
        why = "it does not accept the token" if status == 401 else "the token does not allow it"
        return InputError(f"the Hub refuses access to '{repo_id}' ({status}, {why}): {log_in}, and check {page}")
    if status in TRANSIENT:
        why = "too many requests" if status == 429 else "it is busy or down"
        return InputError(
            f"the Hub answered {status} ({why}) to every try to fetch '{repo_id}', and it is not (or not whole) in "
            "the cache: try again later, or give a folder"
        )
    return InputError(f"the Hub answered {status} when asked for '{repo_id}' ({page}): {_reason(error)}")


def _not_cached(repo_id: str, kind: Kind, at: str) -> InputError:
    download = f"hf download {repo_id}" + (" --repo-type dataset" if kind == "dataset" else "")
    return InputError(
        f"'{repo_id}'{at} is not (or not whole) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
        f"fetch it once while online, for example with `{download}`, or unset HF_HUB_OFFLINE"
    )


def _is_commit(revision: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def _noun(kind: Kind) -> str:
    return "data set" if kind == "dataset" else "model"


def _page(repo_id: str, kind: Kind = "model") -> str:
    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"


def _reason(error: BaseException) -> str:
    """One line of an error: libraries write several, and links to their manuals."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
