"""What of the facts this gateway does not do, with the reason. A test fails as soon as it does."""

from __future__ import annotations

import importlib.util

NATIVE = "pygrpc-native undoes gzip only; without it, grpcio undoes deflate too"
NOT_DONE: dict[tuple[str, str, str], str] = {}
"""By the fact's slug, the wire ("" for both) and the queue."""
if importlib.util.find_spec("pygrpc_native"):
    NOT_DONE |= {("4-deflated-messages-are-read-and-answered", "", queue): NATIVE for queue in ("memory", "embedded")}
