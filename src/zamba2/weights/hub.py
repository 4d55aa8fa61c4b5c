"""Find a checkpoint: a local folder or file, a short name, or a Hugging Face Hub repository.

huggingface_hub does the downloading (parallel, resumed, cached, with progress bars); here are the names and the sentences
for what can go wrong. The token comes from HF_TOKEN or ``hf auth login``, the cache from HF_HOME, a mirror from HF_ENDPOINT.
"""

from __future__ import annotations

import errno
import os
import re
from logging import WARNING, LogRecord, getLogger
from pathlib import Path

from zamba2.errors import Zamba2Error, notice

__all__ = ["ALIASES", "DEMO", "RANDOM", "cache_folder", "quiet_retries", "resolve", "upload"]

# Inside the package: the demonstration model, packed, and a tiny checkpoint with random weights.
DEMO, RANDOM = (Path(__file__).resolve().parent.parent / name for name in ("demo", "random"))

# Short names; upper and lower case are the same.
ALIASES: dict[str, str | Path] = {
    "demo": DEMO,
    "random": RANDOM,
    "1.2b": "Zyphra/Zamba2-1.2B",
    "1.2b-instruct": "Zyphra/Zamba2-1.2B-instruct",
    "2.7b": "Zyphra/Zamba2-2.7B",
    "2.7b-instruct": "Zyphra/Zamba2-2.7B-instruct",
    "7b": "Zyphra/Zamba2-7B",
    "7b-instruct": "Zyphra/Zamba2-7B-Instruct",
}
SMALL_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")  # beside config.json and the weights
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def cache_folder() -> Path:
    """This program's folder in the user's cache. Raises Zamba2Error for a user without a home who names none."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zamba2"
    except RuntimeError:
        raise Zamba2Error("there is no home folder for a cache; set XDG_CACHE_HOME to a folder that can be written to.") from None


def resolve(source: str | Path, *, revision: str | None = None, offline: bool = False, weights: bool = True) -> Path:
    """Return the local folder (or ``.pt`` file) of a checkpoint, downloading it when needed.

    ``source``: an existing folder or ``.pt`` file, else a short name (``ALIASES``; those of embedded models yield only to a
    folder that is a checkpoint), else a Hub id "owner/name". A ``Path``
    is always a local path. ``revision``: branch, tag or commit of a Hub repository. ``offline``: use the download cache
    only (as HF_HUB_OFFLINE=1 does). ``weights``: False fetches configuration and tokenizer alone.

    Raises Zamba2Error, one sentence, for everything that keeps the files from being here.
    """
    name = str(source)
    path = Path(os.path.expanduser(name))
    alias = ALIASES.get(name.lower()) if isinstance(source, str) else None
    if isinstance(alias, Path):
        local = path if os.path.exists(path / "config.json") else alias
    elif name and os.path.exists(path):  # unlike Path.exists it takes names too long for a path
        local = path
    else:
        repository = alias if alias is not None else name
        if isinstance(source, Path) or _looks_like_path(name):
            raise Zamba2Error(f"{path} does not exist; give a checkpoint folder, one of {_short_names()}, or a Hub id owner/name.")
        if not HUB_ID.fullmatch(repository):
            raise Zamba2Error(
                f"{name!r} is no folder here, no short name and no Hub id; give a checkpoint folder, one of {_short_names()}, "
                f"or a Hub id owner/name."
            )
        return _download(repository, revision, offline, weights)
    if revision is not None:
        raise Zamba2Error(f"revision {revision!r} was given for the local {local}; only Hub repositories have revisions: leave it out.")
    if local.is_file() and local.suffix != ".pt":
        raise Zamba2Error(f"{local} is a file; a checkpoint folder (with config.json and *.safetensors) or a .pt file is needed.")
    return local


def _short_names() -> str:
    return ", ".join(ALIASES)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(("/", ".pt")) or name.count("/") > 1


def _download(repository: str, revision: str | None, offline: bool, weights: bool) -> Path:
    check_settings()
    from huggingface_hub import HfApi, constants, snapshot_download

    unreachable: Exception | None = None
    cached_only = offline or constants.HF_HUB_OFFLINE
    try:
        if not cached_only:
            # snapshot_download waits without limit for a silent server, so ask first, with a time limit.
            try:
                HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except Exception as error:
                unreachable = error
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=cached_only or unreachable is not None,
                allow_patterns=["config.json", *SMALL_FILES, *(WEIGHT_FILES if weights else ())],
            )
        )
    except Exception as error:  # the library lets errors of several HTTP libraries through
        raise Zamba2Error(_explain(unreachable or error, repository, revision)) from error
    if unreachable is not None:
        notice(f"the Hub could not be asked about {repository} ({type(unreachable).__name__}); using the copy downloaded earlier.")
    if not (folder / "config.json").is_file():
        raise Zamba2Error(f"The Hub repository {repository} has no config.json; give the id of a Zamba2 model repository.")
    if weights and not any(folder.glob("*.safetensors")):
        raise Zamba2Error(f"{repository} has no *.safetensors file in {folder}; a repository with weights in safetensors is needed.")
    return folder


def check_settings() -> None:
    """The Hub's library reads its environment variables when it is imported. Raises Zamba2Error where one is not what it must be."""
    try:
        import huggingface_hub.constants  # noqa: F401
    except ValueError as error:
        raise Zamba2Error(f"an environment variable of the Hub's (HF_...) cannot be used ({error}); correct it or take it away.") from None


def quiet_retries() -> None:
    """Data sets' library tells of each of its tries and of the wait behind it; here the first is one line, and their end one sentence."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    requests = getLogger("huggingface_hub.utils._http")
    requests.setLevel(WARNING)
    requests.addFilter(tell_of_retries)


def tell_of_retries(record: LogRecord) -> bool:
    """A filter of the library's log: of all the library says of a request, the first time that it waits is told."""
    if "Retry" in record.getMessage():
        notice("the Hub does not answer as it should; it is asked again, for up to a minute.")
    return False


def upload(folder: Path, repository: str, *, private: bool = True) -> str:
    """Put a folder's files into a model repository of the Hub, made if need be; returns its address. Raises Zamba2Error."""
    check_settings()
    from huggingface_hub import HfApi, constants

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by zamba2")
    except Exception as error:  # as above
        reason = _explain(error, repository, None).replace("cannot be downloaded from", "cannot be uploaded to")
        raise Zamba2Error(f"{folder} is complete, but was not uploaded: {reason}") from error
    return f"{constants.ENDPOINT}/{repository}"


def _explain(error: Exception, repository: str, revision: str | None) -> str:
    """One sentence: what was found and what to do."""
    from huggingface_hub import constants, errors

    # The library wraps what really happened when it also finds nothing in its cache.
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    where = repository + (f" (revision {revision})" if revision else "")
    chain: BaseException | None = error
    while chain is not None:  # the operating system's own error may be wrapped
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"The disk is full: {where} does not fit into {constants.HF_HUB_CACHE}; free space or set HF_HOME to another disk."
        if isinstance(chain, PermissionError):
            return f"The download cache {constants.HF_HUB_CACHE} cannot be written ({chain}); fix its permissions or set HF_HOME."
        chain = chain.__cause__
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated; accept its terms at {constants.ENDPOINT}/{repository}, then log in with `hf auth login` "
            f"or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"The Hub has no repository {repository}, or it is private; check the id, and for a private one log in with "
            f"`hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The Hub repository {repository} has no revision {revision!r}; give one of its branches, tags or commits."
    if isinstance(error, errors.HFValidationError):
        return f"{repository!r} is no valid Hub id; owner/name is needed, as in Zyphra/Zamba2-2.7B-instruct."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"The Hub refused access to {where} (HTTP {status}); check the token in HF_TOKEN or log in again with `hf auth login`."
        return f"The Hub answered HTTP {status} for {where}; wait a little and try again."
    if isinstance(error, errors.LocalEntryNotFoundError):  # offline was asked for
        return f"{where} is not fully in the download cache {constants.HF_HUB_CACHE}, and offline was asked for; download it while online."
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ").rstrip(".")
    if isinstance(error, ValueError):
        return f"The Hub at {constants.ENDPOINT} sent an answer for {where} that is not understood ({reason}); check HF_ENDPOINT."
    return f"{where} cannot be downloaded from {constants.ENDPOINT} ({reason}); check the network and try again: finished files are kept."
