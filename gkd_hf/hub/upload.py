"""Upload a finished folder to the Hub: one commit, only of files that an export writes, with patience for trouble."""

from __future__ import annotations

import email.utils
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from gkd_hf.errors import InputError
from gkd_hf.hub.remote_code import model_files

ATTEMPTS = 6
LONGEST_WAIT = 120.0  # seconds between two attempts, whatever the Hub asks for
RETRIED = (408, 412, 425, 429, 500, 502, 503, 504)
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_TEXT = (".json", ".md", ".py", ".txt")
_OURS = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "README.md",
    "handler.py",
    "requirements.txt",
    "report.json",
    "report.png",
    "example.png",
    "onnx/*.onnx",
)
T = TypeVar("T")


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None, summary: str) -> str:
    """Upload an exported encoder or segmenter as one commit; nothing is committed if nothing changed.

    Files of such a folder that the repo has and the folder no longer has are deleted in the same commit; files that
    are not ours stay. What is not a file of an export (pickles, optimiser state, hidden files) is left out and named.

    Returns:
        URL of the repo.

    Raises:
        InputError: what is wrong and what to do about it.
    """
    check_repo_id(repo_id)
    token = usable_token(token)
    files, left_out = files_to_push(folder)
    check_no_tokens(folder, files, token)
    if left_out:
        tell(f"not uploaded from {folder}, since no part of an export: {', '.join(left_out)}")
    api = HfApi(token=token, library_name="gkd_hf")
    url = patiently(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    told = []

    def commit() -> bool:
        info = api.model_info(repo_id)
        if bool(info.private) != private and not told:
            is_, asked = ("private", "public") if info.private else ("public", "private")
            told.append(tell(f"{repo_id} exists and stays {is_}; make it {asked} on {url}/settings"))
        there = [file.rfilename for file in info.siblings or []]
        # New ones for every attempt: the client keeps in them what it has sent.
        operations = [CommitOperationAdd(name, str(folder / name)) for name in files]
        operations += [CommitOperationDelete(name) for name in there if is_ours(name) and name not in files]
        done = api.create_commit(repo_id, operations, commit_message=summary, parent_commit=info.sha)
        return done.oid != info.sha

    changed = patiently(repo_id, commit)
    tell(f"{url}: {'uploaded' if changed else 'unchanged'}")
    return str(url)


def check_push_rights(repo_id: str, token: str | None = None) -> None:
    """Find out before any training whether its result can be pushed.

    A Hub that does not answer is no reason to stop: it is told, and pushing can be repeated.

    Raises:
        InputError: bad repo id, offline mode, no token, a token that is not valid or may only read.
    """
    check_repo_id(repo_id)
    token = usable_token(token)
    try:
        who = HfApi(token=token, library_name="gkd_hf").whoami()
    except (HTTPError, OSError, ValueError) as error:
        status = _status(error)
        if status in (401, 403):
            raise InputError(f"hub.repo_id {repo_id}: {_advice(error, repo_id)}") from error
        tell(f"whether {repo_id} can be pushed is not known yet: {_advice(error, repo_id)}")
        return
    access = (who.get("auth") or {}).get("accessToken") or {}
    fine_grained = json.dumps(access.get("fineGrained") or {})
    if access.get("role") == "read" or (access.get("role") == "fineGrained" and "repo.write" not in fine_grained):
        raise InputError(
            f"hub.repo_id {repo_id}: the token of '{who.get('name')}' may only read; make one with the role write on "
            f"{TOKENS_PAGE} and give it to `hf auth login` or HF_TOKEN, or leave hub.repo_id out and push later"
        )


# -- what is uploaded -------------------------------------------------------------------------------------------------


def is_ours(name: str) -> bool:
    """Whether a path within a repo is one that an export writes."""
    if name in {path.name for path in model_files()}:
        return True
    return any(fnmatchcase(name, pattern) for pattern in _OURS) and name.count("/") <= 1


def files_to_push(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files of an export, and the names of what else lies in its folder; hidden files are not named.

    Raises:
        InputError: no folder, or not that of a finished export.
    """
    if not folder.is_dir():
        raise InputError(f"'{folder}' is no folder")
    found, left_out = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith((".", "__pycache__")) for part in Path(name).parts) or path.is_dir():
            continue
        (found if is_ours(name) and path.is_file() and not path.is_symlink() else left_out).append(name)
    missing = [name for name in ("config.json",) if name not in found]
    if not any(name.endswith(".safetensors") for name in found):
        missing.append("model.safetensors")
    if missing:
        raise InputError(f"'{folder}' is no finished export: it has no {', no '.join(missing)}")
    return found, left_out


def check_no_tokens(folder: Path, names: list[str], token: str) -> None:
    """Raise `InputError` if a text file to be uploaded holds the token in use, or anything that looks like one."""
    secrets = {token, os.environ.get("HF_TOKEN") or token}
    for name in names:
        if name.endswith(_TEXT):
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            if _TOKEN.search(text) or any(secret in text for secret in secrets):
                raise InputError(
                    f"{folder / name} holds an access token: nothing was uploaded; take it out of that file (and, if "
                    f"others saw it, make a new one on {TOKENS_PAGE})"
                )


# -- the Hub and its moods --------------------------------------------------------------------------------------------


def check_repo_id(repo_id: str) -> None:
    """Raise `InputError` if this is not ``org/name``."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"'{repo_id}' is no repo id: {str(error).splitlines()[0]}") from error
    if "/" not in repo_id:
        raise InputError(f"'{repo_id}' is no repo id: give org/name, or your user name before the slash")


def usable_token(token: str | None) -> str:
    """The token to push with: the one given, HF_TOKEN's or the stored one.

    Raises:
        InputError: there is none, or the Hub may not be asked at all.
    """
    if constants.is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it first")
    token = token or get_token()
    if not token:
        raise InputError(
            f"no access token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token of the role write from "
            f"{TOKENS_PAGE}"
        )
    return token


def tell(line: str) -> bool:
    """Say something that is no result, on stderr."""
    print(line, file=sys.stderr, flush=True)
    return True


def patiently(repo_id: str, action: Callable[[], T]) -> T:
    """Do something on the Hub, again and again while the trouble may pass; raise `InputError` when it does not."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _quiet_client():
                return action()
        except (HTTPError, RuntimeError, OSError, ValueError) as error:
            if attempt == ATTEMPTS or not _may_pass(error):
                raise InputError(f"could not push {repo_id}: {_advice(error, repo_id)}") from error
            asked = _asked_wait(error)
            wait = min(LONGEST_WAIT, 2.0**attempt / 2 if asked is None else asked)
            tell(f"{repo_id}: {_what(error)}; trying again in {wait:g} s")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException:
    # The client wraps what went wrong with a large file.
    return error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    cause = _cause(error)
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None


def _may_pass(error: BaseException) -> bool:
    cause, status = _cause(error), _status(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return False
    if status is not None:
        return status in RETRIED
    # A connection that broke off, or an answer that broke off within its JSON.
    return isinstance(cause, HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError)


def _asked_wait(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait: Retry-After, a number or a date."""
    cause = _cause(error)
    value = cause.response.headers.get("Retry-After") if isinstance(cause, HfHubHTTPError) else None
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _what(error: BaseException) -> str:
    status = _status(error)
    if status == 412:
        return "somebody else changed the repo meanwhile"
    if status is not None:
        return f"the Hub answered {status}"
    return f"the connection to the Hub failed ({type(_cause(error)).__name__})"


def _advice(error: BaseException, repo_id: str) -> str:
    """What is wrong and what to do about it, in one line without anything secret."""
    status, page = _status(error), f"https://huggingface.co/{repo_id}"
    org = repo_id.partition("/")[0]
    if status == 401:
        return (
            f"the Hub does not accept the token (401): get one of the role write on {TOKENS_PAGE}, then hf auth login"
        )
    if status == 403:
        return (
            f"the token may not write there (403): it needs the role write, and your account the right to write in "
            f"'{org}'; see {TOKENS_PAGE} and {page}, then hf auth login"
        )
    if status == 404:
        return f"the Hub does not find it (404): check that '{org}' exists and that you belong to it, {page}"
    if status in RETRIED:
        return f"{_what(error)}, {ATTEMPTS} times" if status != 412 else _what(error)
    if status is not None or not _may_pass(error):
        return " ".join(str(_cause(error)).split())[:300]
    return f"{_what(error)}: check the network, or status.huggingface.co"


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the client's own words: a commit without changes is no warning here, and trouble is told by us."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub.hf_api", "huggingface_hub.utils._http")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
