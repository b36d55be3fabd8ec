"""Files from the Hub, fetched with care: retried, checked against their hashes, explained where they cannot be had.

The Hub's client checks sizes only. Here a file is used once its content has the hash that the Hub names it by, and
what goes wrong on the way ends in one `InputError` that says what to do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
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


def pull(repo_id: str, patterns: Sequence[str], *, revision: str | None = None) -> Path:
    """Return the folder of the cache that holds a model's files, each verified against its hash.

    The folder's name is the commit that the revision stood for. Where the Hub cannot be reached even after some
    tries, or HF_HUB_OFFLINE is set, it is what the cache holds; then too only if everything is there.

    Args:
        repo_id: Hub id of a model.
        patterns: which files, as `huggingface_hub.snapshot_download` takes them; those that do not exist are not
            missed.
        revision: commit, tag or branch; None: main.

    Raises:
        InputError: no such repo or revision, no access, no connection and nothing in the cache, or content that is
            still damaged after it was fetched again.
    """
    for attempt in range(2):
        folder = _fetch(repo_id, patterns, revision)
        damaged = [path for path in _files(folder, patterns) if not _verified(repo_id, folder, path)]
        for path in damaged:
            _remove(path)
        if not damaged:
            return folder
        names = ", ".join(path.relative_to(folder).as_posix() for path in damaged)
        logger.warning("%s of '%s' came damaged (another hash than the Hub's); removed", names, repo_id)
        if constants.is_offline_mode():
            raise InputError(
                f"{names} of '{repo_id}' is damaged in the cache (its content has another hash than the Hub gives); "
                "it was removed. Unset HF_HUB_OFFLINE and start again to fetch it"
            )
        if attempt == 1:
            raise InputError(
                f"{names} of '{repo_id}' came damaged twice: its content has another hash than {_page(repo_id)} "
                "gives. It is not used, and was removed from the cache; try again, over another connection or "
                "without a proxy in between"
            )
    raise AssertionError("not reached")


def listed_files(repo_id: str, commit: str) -> list[str] | None:
    """Names of all files of a commit that was pulled; None if only their presence in the cache is known."""
    try:
        return [entry.path for entry in get_cached_repo_tree(repo_id, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return None


def pulled_commit(repo_id: str, revision: str | None = None) -> str | None:
    """The commit that a model's revision stood for when it was last pulled, without asking the Hub.

    None if it was never pulled: a folder, or `toy`.
    """
    if os.path.isdir(repo_id):
        return None
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[])).name
    except (LocalEntryNotFoundError, HFValidationError):
        return None


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
                f"cannot reach {page} ({_reason(each)}){_and_not_cached(kind)}: check the connection, or give a folder"
            )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"cannot read '{repo_id}'{at} from {page}: {reason}")


def _fetch(repo_id: str, patterns: Sequence[str], revision: str | None) -> Path:
    try:
        if constants.is_offline_mode():
            return _from_cache(repo_id, patterns, revision)
        try:
            return with_retries(lambda: _fetch_once(repo_id, patterns, revision), f"fetching '{repo_id}'")
        except Exception as error:
            if not is_transient(error):
                raise
            try:
                folder = _from_cache(repo_id, patterns, revision)
            except LocalEntryNotFoundError:
                raise error from None
            logger.warning(
                "the Hub cannot be reached (%s): '%s' is taken from the cache, commit %s",
                _reason(error),
                repo_id,
                folder.name,
            )
            return folder
    except (HTTPError, OSError, EntryNotFoundError, HFValidationError, ValueError, _Unsettled) as error:
        raise hub_error(error, repo_id, revision=revision) from error


def _fetch_once(repo_id: str, patterns: Sequence[str], revision: str | None) -> Path:
    commit = revision
    if revision is None or not _is_commit(revision) or listed_files(repo_id, revision) is None:
        # Where this fails, snapshot_download would silently go on with what its cache holds.
        commit = HfApi().model_info(repo_id, revision=revision).sha
    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    if folder.name != commit or listed_files(repo_id, commit) is None:
        raise _Unsettled(f"the Hub did not list the files of '{repo_id}'")
    return folder


def _from_cache(repo_id: str, patterns: Sequence[str], revision: str | None) -> Path:
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns), local_files_only=True))


def _files(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))


_seen_whole: set[tuple[str, int, int]] = set()


def _verified(repo_id: str, folder: Path, path: Path) -> bool:
    """Whether a file has the content that the Hub says: by its entry in the listing, or its blob's name."""
    state = path.stat()
    key = (str(path), state.st_size, state.st_mtime_ns)
    if key in _seen_whole:
        return True
    # The client names a blob by its ETag: the SHA-256 of an LFS file, git's SHA-1 of any other. Where there are no
    # links, or the ETag came damaged, there is still the listing: there an LFS file has the SHA-1 of its pointer.
    expected = {Path(os.readlink(path)).name} if path.is_symlink() else set()
    try:
        name = path.relative_to(folder).as_posix()
        expected |= {
            entry.blob_id for entry in get_cached_repo_tree(repo_id, revision=folder.name) if entry.path == name
        }
    except CachedRepoTreeNotFoundError:
        pass
    if not expected & _names(path, state.st_size):
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
            f"the Hub answered {status} ({why}) to every try to fetch '{repo_id}'{_and_not_cached(kind)}: try again "
            "later, or give a folder"
        )
    return InputError(f"the Hub answered {status} when asked for '{repo_id}' ({page}): {_reason(error)}")


def _not_cached(repo_id: str, kind: Kind, at: str) -> InputError:
    if kind == "dataset":
        return InputError(
            f"'{repo_id}' is streamed from the Hub, which keeps no copy here, and HF_HUB_OFFLINE is set: unset it, or "
            f"fetch the data while online with `hf download {repo_id} --repo-type dataset --local-dir FOLDER` and "
            "give that folder"
        )
    return InputError(
        f"'{repo_id}'{at} is not (or not whole) in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
        f"fetch it once while online, for example with `hf download {repo_id}`, or unset HF_HUB_OFFLINE"
    )


def _and_not_cached(kind: Kind) -> str:
    return ", and it is not (or not whole) in the cache" if kind == "model" else ""


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
