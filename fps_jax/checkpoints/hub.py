"""Hugging Face repositories: the listing and the JSON files first, weights only of what will be read."""

import pathlib
from collections.abc import Callable
from typing import Any

from fps_jax.checkpoints.format import is_checkpoint

_JSONS = ["*.json"]


def is_repository(path: str) -> bool:
    """Whether a path that is no local one may be 'owner/name'."""
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")


def listing(repo: str) -> tuple[pathlib.Path, list[str]]:
    """(the folder of the repository's JSON files in the hub's cache, the names of all its files).

    Without a network, what the cache has of it.
    Raises: FileNotFoundError in one line.
    """
    import huggingface_hub

    try:
        names = list(huggingface_hub.list_repo_files(repo))
        return pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=_JSONS)), names
    except Exception as error:
        cached = _cached(repo)
        if cached is None:
            raise _failed(repo, error) from error
        files = (file for file in cached.rglob("*") if file.is_file())
        return cached, [file.relative_to(cached).as_posix() for file in files]


def tensor_names(repo: str) -> Callable[[str], list[str]]:
    """A function of a safetensors file's name in a repository: its tensors' names, of its header alone; none if the hub fails."""
    import huggingface_hub

    def of(name: str) -> list[str]:
        try:
            return list(huggingface_hub.parse_safetensors_file_metadata(repo, name).tensors)
        except Exception:  # then the file says it itself, once it is here
            return []

    return of


def _cached(repo: str) -> pathlib.Path | None:
    """The folder of what was downloaded before; none that holds no weights."""
    import huggingface_hub

    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except Exception:  # the library's own kinds, of which each release has others
        return None
    return folder if is_checkpoint(folder) or any(folder.rglob("*.safetensors")) else None


def fetch(repo: str, choose: Callable[..., Any]) -> pathlib.Path:
    """Downloads a checkpoint into the hub's cache; returns its folder.

    Args:
      choose: of a repository that isn't ours: choose(folder of the JSON files, names, repo, `tensor_names(repo)`) has `files`,
        those to download, or raises.
    Raises: FileNotFoundError in one line where the hub fails; as `choose`, and then no weights were downloaded.
    """
    import huggingface_hub

    folder, names = listing(repo)
    wanted = names if is_checkpoint(folder) else choose(folder, names, repo, tensor_names(repo)).files
    if all((folder / name).is_file() for name in wanted):
        return folder
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:
        raise _failed(repo, error) from error


def _failed(repo: str, error: Exception) -> FileNotFoundError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FileNotFoundError(
        f"checkpoint {repo!r} is no local directory, and downloading it from the Hugging Face hub failed: {first}"
    )
