"""Pushing an encoder, a generation's or a training's, to Hugging Face's hub.

Only the encoder's folder goes there, its model card with it: index and ids derive from memories
and stay. Endpoint and token are those of huggingface_hub (``HF_ENDPOINT``, ``HF_TOKEN``, or what
``hf auth login`` left).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memshare.retrieval.card import CARD
from memshare.retrieval.manifest import (
    GenerationError,
    NoGeneration,
    folder_name,
    read_manifest,
    verify,
)
from memshare.retrieval.shelf import Lease, read_current

_ENCODER = "encoder/"


class PushError(GenerationError):
    """The hub did not take the encoder; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is pushed: ``files`` by their name in the repository, with bytes, and what it is."""

    name: str
    folder: Path
    files: dict[str, int]

    def card(self) -> str:
        """The model card."""
        return (self.folder / CARD).read_text(encoding="utf-8")


@contextmanager
def parcel(home: Path, number: int | None) -> Iterator[Parcel]:
    """Generation ``number`` (None: CURRENT), every byte of it verified, and kept while in use.

    Raises `NoGeneration`, `DamagedGeneration`, and `PushError` for one from before there were
    model cards.
    """
    wanted = read_current(home)[0] if number is None else number
    if wanted is None:
        raise NoGeneration(f"{home}: nothing was published yet")
    with Lease(home, wanted):
        folder = home / folder_name(wanted)
        manifest = read_manifest(folder)
        verify(folder, manifest, fresh=True)
        files = {
            name.removeprefix(_ENCODER): blob.size
            for name, blob in manifest.files.items()
            if name.startswith(_ENCODER)
        }
        if CARD not in files:
            raise PushError(f"{folder}: its encoder has no model card; publish a new generation")
        yield Parcel(f"generation {wanted} of retriever {home.name}", folder / _ENCODER, files)


def push(parcel: Parcel, repo: str, *, private: bool) -> str:
    """Make ``repo`` unless it is there, and commit the parcel to it; returns the commit's URL.

    ``private`` holds for a repository that is made now. Files in it that the parcel lacks stay.
    Raises `PushError`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token

    api = HfApi(library_name="memshare")
    if get_token() is None:
        raise PushError(
            f"no token for {api.endpoint}: set HF_TOKEN to one that may write, or run hf auth login"
        )
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=parcel.folder / name)
        for name in parcel.files
    ]
    message = parcel.name[:1].upper() + parcel.name[1:]
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)  # None: its default
        done = api.create_commit(made.repo_id, operations, commit_message=message)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "the token is not accepted: set HF_TOKEN to a valid one",
            403: "the token may not write there: set HF_TOKEN to one that may",
        }.get(status, error.server_message or "the hub refused it")
        raise PushError(f"{repo} was not pushed to {api.endpoint}: {status}, {advice}") from error
    except errors.HFValidationError as error:
        raise PushError(f"{repo!r} is no name of a repository: {error}") from error
    # Of whichever HTTP library huggingface_hub uses; OSError: offline mode.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise PushError(f"{repo} was not pushed to {api.endpoint}: {error}") from error
    return str(done.commit_url)


def deliver(parcel: Parcel, args: argparse.Namespace) -> int:
    """`push` by ``args`` of `add_push_arguments`, and say so. Raises `PushError`."""
    if args.dry_run:
        print(parcel.card())
        for name, size in parcel.files.items():
            print(f"{size:12d} {name}")
        print(f"{parcel.name}: {len(parcel.files)} files for {args.repo}; not sent")
        return 0
    url = push(parcel, args.repo, private=args.private)
    print(f"{parcel.name}: {len(parcel.files)} files pushed: {url}")
    return 0
