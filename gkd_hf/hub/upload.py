"""Upload a finished folder to the Hub: one commit, only of files that an export writes, with patience for trouble."""

from __future__ import annotations

import email.utils
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_token,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from gkd_hf.errors import InputError
from gkd_hf.hub.pushed import PushedRecord, content_names, hub_name
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

    What others did in the repo stays. A file that the folder no longer has is deleted in the same commit only if it
    is on the Hub as it was pushed from here, which ``pushed.json`` beside the folder remembers; a README.md that was
    changed there is left as it is. Whatever of ours is deleted, left or replaced is named on stderr, as is what the
    folder holds and no export writes (pickles, optimiser state, …), which is not uploaded.

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
    content = {name: content_names(folder / name) for name in files}
    record = PushedRecord(folder, repo_id)

    def commit() -> tuple[bool, ModelInfo, Changes]:
        info = api.model_info(repo_id, files_metadata=True)
        there = {file.rfilename: file for file in info.siblings or []}
        readme = there.get("README.md")
        empty = set(there) <= {".gitattributes", "README.md"} and _only_metadata(api, repo_id, readme, info.sha)
        changes = Changes.between(content, there, record, replace_readme=empty)
        # New ones for every attempt: the client keeps in them what it has sent.
        operations = [CommitOperationAdd(name, str(folder / name)) for name in files if name not in changes.left]
        operations += [CommitOperationDelete(name) for name in changes.deleted]
        done = api.create_commit(repo_id, operations, commit_message=summary, parent_commit=info.sha)
        return done.oid != info.sha, info, changes

    changed, before, changes = patiently(repo_id, commit)
    if bool(before.private) != private:
        is_, asked = ("private", "public") if before.private else ("public", "private")
        tell(f"{repo_id} exists and stays {is_}; make it {asked} on {url}/settings")
    changes.tell(repo_id, url, folder)
    try:
        now = {name: names for name, names in content.items() if name not in changes.left}
        # A card that was left may come back to what we wrote.
        record.save(now | {name: record.files[name] for name in changes.left if name in record.files})
    except OSError as error:
        tell(f"{record.path} cannot be written ({error.strerror}): the next push will take {repo_id} for another's")
    tell(f"{url}: {'uploaded' if changed else 'unchanged'}")
    return str(url)


@dataclass(frozen=True)
class Changes:
    """What a push does to files that are on the Hub already, by their paths within the repo.

    Attributes:
        deleted: pushed from here once, no longer exported.
        left: not touched, since they are not as we pushed them.
        replaced: written over, though they are not as we pushed them.
    """

    deleted: list[str]
    left: list[str]
    replaced: list[str]

    @classmethod
    def between(
        cls,
        content: Mapping[str, tuple[str, str]],
        there: Mapping[str, RepoSibling],
        record: PushedRecord,
        replace_readme: bool,
    ) -> Changes:
        """Compare what is pushed, as path → `content_names`, with what is there and what we know of it."""
        gone = [name for name in there if is_ours(name) and name not in content]
        foreign = [
            name
            for name, names in content.items()
            if name in there and hub_name(there[name]) not in names and not record.knows(there[name])
        ]
        kept = [name for name in foreign if name == "README.md" and not replace_readme]
        return cls(
            deleted=[name for name in gone if record.knows(there[name])],
            left=kept + [name for name in gone if not record.knows(there[name])],
            replaced=[name for name in foreign if name not in kept],
        )

    def tell(self, repo_id: str, url: str, folder: Path) -> None:
        """Name the files on stderr."""
        if self.deleted:
            tell(f"deleted from {repo_id}, since no longer exported: {', '.join(self.deleted)}")
        if self.replaced:
            tell(f"replaced in {repo_id}, whose history keeps what was there: {', '.join(self.replaced)}")
        others = [name for name in self.left if name != "README.md"]
        if others:
            tell(f"left in {repo_id}, since not as pushed from here: {', '.join(others)}")
        if "README.md" in self.left:
            tell(
                f"left in {repo_id}: README.md, which is not as pushed from here and may not tell of these weights; "
                f"to publish {folder / 'README.md'}, delete it on {url}/tree/main and push again"
            )


def _only_metadata(api: HfApi, repo_id: str, readme: RepoSibling | None, revision: str) -> bool:
    """Whether a card is nothing but what the Hub's page writes into a repo made there: no text, or none at all."""
    if readme is None:
        return True
    # The client's own download would turn passing trouble into a file that cannot be found.
    address = hf_hub_url(repo_id, "README.md", revision=revision, endpoint=api.endpoint)
    answer = get_session().get(address, headers=build_hf_headers(token=api.token))
    hf_raise_for_status(answer)
    text = answer.text
    return not re.sub(r"\A\s*---\r?\n.*?^---\s*$", "", text, flags=re.DOTALL | re.MULTILINE).strip()


def check_push_rights(*repo_ids: str, token: str | None = None) -> None:
    """Find out before any training whether its result can be pushed.

    A Hub that does not answer is no reason to stop: it is told, and pushing can be repeated.

    Args:
        repo_ids: where it will go. token: None takes HF_TOKEN or what ``hf auth login`` stored.

    Raises:
        InputError: bad repo id, offline mode, no token, a token that is not valid or may only read, or that may not
            write in the organisation of a repo.
    """
    for repo_id in repo_ids:
        check_repo_id(repo_id)
    token, first = usable_token(token), repo_ids[0]
    try:
        with _quiet_client():
            who = HfApi(token=token, library_name="gkd_hf").whoami()
    except (HTTPError, OSError, ValueError) as error:
        status = _status(error)
        if status in (401, 403):
            raise InputError(f"hub.repo_id {first}: {_advice(error, first)}") from error
        tell(f"whether {first} can be pushed is not known yet: {_advice(error, first)}")
        return
    for repo_id in repo_ids:
        trouble = _why_not(who, repo_id)
        if trouble:
            raise InputError(
                f"hub.repo_id {first}: {trouble}; give a token that may to `hf auth login` or HF_TOKEN "
                f"({TOKENS_PAGE}), or leave hub.repo_id out and push later"
            )


def _why_not(who: Mapping[str, Any], repo_id: str) -> str:
    """Why the account and token that the Hub described cannot push a repo; "" if nothing is known against it."""
    org, user = repo_id.partition("/")[0], str(who.get("name"))
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        return f"the token of '{user}' may only read, and the role write is needed"
    if access.get("role") == "fineGrained":
        given = access.get("fineGrained") or {}
        scopes = [scope for scope in given.get("scoped") or [] if "repo.write" in (scope.get("permissions") or [])]
        names = [str((scope.get("entity") or {}).get("name")) for scope in scopes]
        everywhere = "repo.write" in (given.get("global") or [])
        if not names and not everywhere:
            return f"the fine-grained token of '{user}' may only read: it has write access to no repos"
        if not everywhere and not {org.lower(), repo_id.lower()} & {name.lower() for name in names}:
            return f"the fine-grained token of '{user}' has write access to {', '.join(names)}, not to {repo_id}"
        return ""
    if "orgs" not in who or org.lower() == user.lower():
        return ""
    roles = {str(each.get("name")).lower(): each.get("roleInOrg") for each in who["orgs"] or []}
    if org.lower() not in roles:
        member = f"a member of {', '.join(sorted(roles))}" if roles else "a member of no organisation"
        return f"'{org}' is not an account that the token can write to: it is that of '{user}', {member}"
    if roles[org.lower()] == "read":
        return f"'{user}' may only read in '{org}'"
    return ""


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
    """Silence the client's own words: a commit without changes is no warning here, and trouble is told by us.

    Its bars are for a terminal; in a log they are thousands of lines.
    """
    loggers = [logging.getLogger(name) for name in ("huggingface_hub.hf_api", "huggingface_hub.utils._http")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    asked_for = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    hidden = not (sys.stderr.isatty() or asked_for or are_progress_bars_disabled())
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        if hidden:
            enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
