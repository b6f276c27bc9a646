"""publish: upload exports to the Hugging Face hub, each into a repository of its own."""

from __future__ import annotations

from huggingface_hub import HfApi

from compress.cli.command import Given
from compress.cli.folders import exports
from compress.config.publishing import refuse_bad_id, refuse_bad_licence
from compress.publishing.folders import Names, Publication, publications
from compress.publishing.upload import Visibility, commit_of
from compress.publishing.upload import publish as upload


def publish(given: Given) -> None:
    """Upload one export, or those of a folder; or show what would be uploaded."""
    own, api = given.own, HfApi()
    refuse_bad_id(own.repository, "repository")
    refuse_bad_id(own.base_model, "--base-model")
    refuse_bad_id(own.base and own.base.partition("@")[0], "--base")
    refuse_bad_licence(own.license)
    folders = exports(own.folder)
    names = Names(
        repository=own.repository,
        base_model=own.base_model,
        licence=own.license,
        base=None if own.base is None else commit_of(own.base, api),
    )
    found = publications(folders, names)
    for publication in found:
        for option in publication.lacks:
            print(f"note: {publication.repository}: its card lacks what {option} gives")
        if own.dry_run:
            _show(publication, Visibility(own.public))
        else:
            address = upload(publication, Visibility(own.public), api)
            print(f"{publication.folder}: published as {publication.repository}, {address}")


def _show(publication: Publication, visibility: Visibility) -> None:
    """The repository, its files with their bytes, and its card."""
    files = publication.files
    print(
        f"{publication.repository}: would be {visibility} where it is new, {len(files)} files, "
        f"{sum(files.values()):,} bytes"
    )
    width = max(map(len, files))
    for name, n_bytes in files.items():
        print(f"  {name:<{width}}  {n_bytes:>15,}")
    print(f"\n{publication.card}")
