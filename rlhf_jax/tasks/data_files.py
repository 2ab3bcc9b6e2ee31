"""The files that data sets are made from: on this machine, or downloaded and checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf_jax.digests import file_digest
from rlhf_jax.errors import UserError


@dataclass(frozen=True)
class DataFile:
    """A file of a data set: where it lies in a data folder, and the public file there may be.

    `sha256` is the hash of the bytes at `url`.
    """

    file: str
    url: str | None = None
    sha256: str | None = None

    def local_path(self) -> Path | None:
        """The file in the data folder, None if it isn't there."""
        folder = data_folder()
        path = folder / self.file if folder else None
        return path if path and path.is_file() else None


def data_folder() -> Path | None:
    """$RLHF_JAX_DATA, else `shared/data` beside the repository, else None."""
    stated = os.environ.get("RLHF_JAX_DATA")
    if stated:
        if not Path(stated).is_dir():
            raise UserError(f"RLHF_JAX_DATA={stated} is no folder")
        return Path(stated)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return beside if beside.is_dir() else None


def fetch(file: DataFile, dl_manager) -> Path:
    """The local path of a file, downloaded by TFDS if it is in no data folder.

    Raises:
        UserError: it can't be had, or its public address gives other bytes than expected.
    """
    path = file.local_path()
    if path:
        return path
    remedy = f"put the file at $RLHF_JAX_DATA/{file.file}"
    if file.url is None:
        raise UserError(f"{file.file} is not on this machine and has no public address; {remedy}")
    try:
        path = Path(dl_manager.download(file.url))
    except Exception as error:  # whatever the download library meets: no network, 404, a full disk
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot download {file.url} ({reason}); {remedy}") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
        raise UserError(f"{file.url} gave other bytes than expected, see {path}; {remedy}")
    return path


def digest(files: Iterable[DataFile]) -> str:
    """A digest of the contents of files, "" of none.

    A file that is to be downloaded counts as the hash that it must have.
    """
    paths = ((file.sha256, file.local_path()) for file in files)
    digests = [file_digest(path) if path else sha256 for sha256, path in paths]
    return hashlib.sha256(f"{digests}".encode()).hexdigest()[:12] if digests else ""
