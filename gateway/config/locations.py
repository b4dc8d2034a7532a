"""Where a model repository is: a folder of this machine, or `s3://`, `gs://`, `as://` or `hf://`, written as Triton has it.

`s3://bucket/path`, and for servers that are not Amazon's `s3://host:port/bucket/path` (by HTTP) or
`s3://https://host:port/bucket/path`; `gs://bucket/path`; `as://account/container/path`; `hf://owner/name[@revision]/path`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from gateway.errors import InvalidArgument

_REMOTE = re.compile(r"(s3|gs|as|hf)://(.*)", re.DOTALL)
_HOST = re.compile(r"(https?://)?([0-9A-Za-z.-]+(?::[0-9]+)?)/(.*)")
_FORMS = {
    "s3": (1, "s3://bucket/path, s3://host:port/bucket/path or s3://https://host:port/bucket/path"),
    "gs": (1, "gs://bucket/path"),
    "as": (2, "as://account/container/path"),
    "hf": (2, "hf://owner/name/path or hf://owner/name@revision/path"),
}
# In a list separated by ':' a remote repository has that sign after its scheme, and before a port.
_PLACE = re.compile(r"(?:s3|gs|as|hf)://(?:https?://)?[^/:]*(?::\d+(?=/))?[^:]*|[^:]+")


@dataclass(frozen=True, slots=True)
class Location:
    """A repository that is not a folder of this machine. `path` begins with the bucket, container or Hugging Face repository.

    `host` is where the store is if not where its scheme says: with `http://` or `https://` for s3, an account for as.
    """

    scheme: str
    path: str
    host: str = ""

    @property
    def url(self) -> str:
        """As in the settings, without superfluous signs."""
        return f"{self.scheme}://{self.host}/{self.path}" if self.host else f"{self.scheme}://{self.path}"

    @property
    def name(self) -> str:
        """Its last part, which says little of where it is."""
        return self.path.rpartition("/")[2]


def read_place(value: Any) -> Path | Location:
    """What one `--model-repository` names. Raises `ValueError` for a remote one that is not written as it should be."""
    if isinstance(value, Path | Location):
        return value
    found = _REMOTE.fullmatch(str(value))
    if found is None:
        return Path(value)
    scheme, rest = found[1], found[2]
    host = ""
    if scheme == "s3" and (server := _HOST.fullmatch(rest)) and (server[1] or ":" in server[2]):
        host, rest = (server[1] or "http://") + server[2], server[3]
    parts = [part for part in rest.split("/") if part]
    least, forms = _FORMS[scheme]
    if scheme == "as" and parts:
        host = parts.pop(0)
        least -= 1
    if len(parts) < least or ".." in parts or (scheme == "s3" and ":" in parts[0]):
        raise ValueError(f"must be a folder or {forms}, got '{value}'")
    return Location(scheme, "/".join(parts), host)


def split_places(value: Any) -> Any:
    """The places in a text that is separated as the system separates paths; of anything else nothing is made."""
    if not isinstance(value, str):
        return value
    return _PLACE.findall(value) if os.pathsep == ":" else value.split(os.pathsep)


Places: TypeAlias = Annotated[
    tuple[Annotated[Path | Location, BeforeValidator(read_place)], ...], NoDecode, BeforeValidator(split_places)
]
"""The type of the setting `model_repository`."""


def folders(places: Sequence[Path | Location]) -> list[Path]:
    """The places, all of which must be folders of this machine. Raises `InvalidArgument` when one is not."""
    for place in places:
        if isinstance(place, Location):
            raise InvalidArgument(
                f"'{place.url}' is no folder of this machine, where alone this command works; copy it"
            )
    return [place for place in places if isinstance(place, Path)]
