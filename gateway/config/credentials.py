"""How to sign in at a store: from the environment, or from the file that `TRITON_CLOUD_CREDENTIAL_PATH` names, as Triton.

The file has a JSON object for each scheme, whose keys are beginnings of URLs: the longest that fits is taken, and the
empty one fits all. What neither says is left to the store's own library, which knows of roles, profiles and log-ins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.config.locations import Location
from gateway.errors import InvalidArgument

VARIABLE = "TRITON_CLOUD_CREDENTIAL_PATH"

_ENVIRONMENT = {
    "s3": {
        "key_id": "AWS_ACCESS_KEY_ID",
        "secret_key": "AWS_SECRET_ACCESS_KEY",
        "session_token": "AWS_SESSION_TOKEN",
        "region": "AWS_DEFAULT_REGION",
        "profile": "AWS_PROFILE",
    },
    "as": {"account_str": "AZURE_STORAGE_ACCOUNT", "account_key": "AZURE_STORAGE_KEY"},
    "gs": {"path": "GOOGLE_APPLICATION_CREDENTIALS"},
    "hf": {"token": "HF_TOKEN"},
}


def credentials(location: Location, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to sign in with now, by the names of Triton's file (`path` for gs and `token` for hf); what is empty is left out.

    Raises `InvalidArgument` for a file that cannot be read; its content is never told.
    """
    found: Any = None
    if file := environ.get(VARIABLE):
        found = _matching(_entries(file, location.scheme), location)
    if isinstance(found, str):
        found = {"path": found}
    if found is None:
        found = {key: environ.get(name, "") for key, name in _ENVIRONMENT[location.scheme].items()}
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise InvalidArgument(
            f"{VARIABLE}: what it has for '{location.url}' must be an object of strings, or for gs a path"
        )
    return {key: value for key, value in found.items() if value}


def _entries(file: str, scheme: str) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(file).read_text("utf-8"))
    except OSError as problem:
        raise InvalidArgument(f"{VARIABLE}: the file cannot be read: {problem.strerror}") from None
    except ValueError:
        raise InvalidArgument(f"{VARIABLE}: the file is not JSON") from None
    entries = content.get(scheme, {}) if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        raise InvalidArgument(f"{VARIABLE}: the file must hold an object for each of gs, s3, as")
    return entries


def _matching(entries: Mapping[str, Any], location: Location) -> Any:
    # Where the settings leave out that a server speaks HTTP, the file may too.
    urls = [f"{url}/" for url in (location.url, location.url.replace("s3://http://", "s3://", 1))]
    fitting = [key for key in entries if not key or any(url.startswith(key.rstrip("/") + "/") for url in urls)]
    return entries[max(fitting, key=len)] if fitting else None
