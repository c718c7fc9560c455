"""Why something could not be had from the hub or a folder, in one line, for the errors of whatever asked for it."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["FETCH_ERRORS", "why_not_fetched"]

FETCH_ERRORS = (OSError, HFValidationError, EntryNotFoundError)
"""What huggingface_hub, and libraries that ask it, raise where a file cannot be had."""


def why_not_fetched(error: BaseException) -> str:
    """Return why a file could not be had, without a full stop: of an error that a library raised, or of its causes."""
    for cause in _causes(error):
        for kinds, why in _reasons():
            if isinstance(cause, kinds):
                return why
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _reasons() -> tuple[tuple[tuple[type[BaseException], ...], str], ...]:
    # Of several that fit, the first: what is gated is told as not found, and a missing copy as a missing entry.
    network = (
        "the network is not asked (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    )
    return (
        ((GatedRepoError,), "the hub gives it only to whom its owner granted access; log in with `hf auth login`"),
        ((RepositoryNotFoundError,), "the hub has no repository of this name, or it is private"),
        ((RevisionNotFoundError,), "the repository has no such revision"),
        (
            (LocalEntryNotFoundError, OfflineModeIsEnabled),
            f"{network}, and the cache ({constants.HF_HUB_CACHE}) has no copy",
        ),
        ((EntryNotFoundError,), "the repository lacks a file that is needed"),
        ((HFValidationError,), "it is neither a folder nor a name on the hub, such as 'owner/name'"),
        ((HfHubHTTPError,), "the hub answers with an error; try again later"),
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and what it was raised from, or while handling."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
