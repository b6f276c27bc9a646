"""The upload of exports through huggingface_hub: a repository each, private unless it is said."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

# The base of what its library for HTTP raises: which library that is has changed between versions.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

from compress.errors import CheckpointError, RecipeError
from compress.publishing.folders import Publication
from compress.report.environment import toolkit_version

_OURS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.npz")
"""Files of an earlier upload that are removed where this one has none of the name: loaders would read them too."""


class Visibility(enum.StrEnum):
    """Who sees a new repository."""

    PRIVATE = "private"
    PUBLIC = "public"


def publish(publication: Publication, visibility: Visibility, api: HfApi) -> str:
    """Upload an export into its repository, which is made if it is not there; returns the address of the commit.

    Raises CheckpointError for files that are not as they were exported and for what the hub refuses, RecipeError for a
    repository that everybody sees where none was wanted.
    """
    name = publication.repository
    with TemporaryDirectory() as scratch, _told(name):
        publication.stage(Path(scratch))
        _make(name, visibility, api)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=scratch,
            commit_message=f"{publication.export.format} export of compress-llm {toolkit_version()}",
            delete_patterns=list(_OURS),
        )
    return str(commit.commit_url)


def commit_of(repository: str, api: HfApi) -> tuple[str, str]:
    """A repository, as owner/name or owner/name@commit, and its commit. Raises CheckpointError if the hub has none."""
    name, _, revision = repository.partition("@")
    with _told(name):
        found = api.model_info(name, revision=revision or None).sha
    if found is None:
        raise CheckpointError(f"{name}: the hub tells no commit of it")
    return name, found


def _make(name: str, visibility: Visibility, api: HfApi) -> None:
    try:
        is_private = bool(api.model_info(name).private)
    except RepositoryNotFoundError:
        api.create_repo(name, private=visibility is Visibility.PRIVATE, exist_ok=True)
        return
    if visibility is Visibility.PRIVATE and not is_private:
        raise RecipeError(
            f"{name} is there, and everybody sees it; say --public if that is meant, or name another repository"
        )


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Tells what the hub's client raises as errors of this toolkit, with what would be right."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise CheckpointError(
            f"{name}: no token of the hub is here; run `hf auth login`"
        ) from error
    except OfflineModeIsEnabled as error:
        raise CheckpointError(
            f"{name}: the hub is not asked while HF_HUB_OFFLINE is set"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: the hub has no such repository that you may read"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {401: "run `hf auth login`", 403: "your token may not write there"}.get(status)
        raise CheckpointError(
            f"{name}: the hub answered {status}: {error.server_message or error}"
            + (f"; {advice}" if advice else "")
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{name}: {error}") from error
    except TransportError as error:
        raise CheckpointError(
            f"{name}: the hub cannot be reached: {error}; try again, an upload goes on"
        ) from error
