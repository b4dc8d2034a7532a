"""What of the facts this gateway does not do, with the reason. A test fails as soon as it does."""

from __future__ import annotations

import importlib.util

SEQUENCES = "sequences over Redis: workers that share a queue take each other's requests"
RAGGED = "allow_ragged_batch is refused, with what to do"
FILES = "files in a load request are refused, with what to do"
NATIVE = "pygrpc-native undoes gzip only; without it, grpcio undoes deflate too"
OF_SEQUENCES = (
    "5-0-and-an-empty-string-are-no-sequence",
    "5-an-id-may-be-a-number-of-64-bits-or-a-string",
    "6-numbers-of-64-bits-are-numbers-and-no-strings",
    "6-a-sequence-may-be-idle-for-a-second",
    "11-a-model-of-sequences-serves",
    "11-controls-are-no-inputs-and-the-scheduler-gives-them",
    "11-an-id-may-be-a-string-where-the-model-takes-one",
    "11-a-first-request-without-start-is-refused",
    "11-a-state-begins-as-its-file-says",
)
NOT_DONE: dict[tuple[str, str, str], str] = {
    **{(slug, "", "embedded"): SEQUENCES for slug in OF_SEQUENCES},
    ("5-start-and-end-are-booleans", "http", "embedded"): SEQUENCES,
    **{("11-a-model-with-ragged-batches-serves", "", queue): RAGGED for queue in ("memory", "embedded")},
    **{("6-a-file-may-be-sent-with-a-configuration", "", queue): FILES for queue in ("memory", "embedded")},
}
"""By the fact's slug, the wire ("" for both) and the queue."""
if importlib.util.find_spec("pygrpc_native"):
    NOT_DONE |= {("4-deflated-messages-are-read-and-answered", "", queue): NATIVE for queue in ("memory", "embedded")}
