"""An export onto the Hugging Face hub: only where asked, private unless asked, and only what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def require_name(repo: str) -> None:
    """Raises ConfigError where `repo` cannot be the name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            f"{repo!r} is no name of a repository: {error} Expected owner/name."
        ) from error


def push(
    directory: Path,
    repo: str,
    *,
    files: Sequence[Path],
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    message: str = "Export with Hotloop",
) -> str:
    """Makes the repository where it is missing and puts `files` into it, in one commit; returns its address.

    Args:
        directory: what the files' names in the repository are relative to.
        repo: "owner/name".
        files: what to send; nothing else in the directory is.
        private: of a repository that is made now; one that exists keeps its own setting.
        token: of the hub; the one that `hf auth login` stored where None. It is in no message.
        endpoint: another hub than the public one.
        message: of the commit.

    Raises:
        ExportError: the hub refuses it or cannot be reached; files here stay.

    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint, token=token)
    operations: list[Any] = [
        CommitOperationAdd(str(file.relative_to(directory)), str(file)) for file in files
    ]
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message=message)
    except (
        Exception
    ) as error:  # its own, its HTTP library's, a refused card: all mean the same here
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = text.replace(token, "[token]") if token else text
        raise ExportError(
            f"the hub did not take {repo!r}: {text}. Nothing here was changed; check the name and that "
            "you are logged in with a token that may write (`hf auth login`), then push again."
        ) from error
    return str(address)
