"""How a request to a server failed, told by what follows from it, and as the one error table has it.

What a server says of a request (400, 413, 504) is its client's business and keeps its text. What it says of us
(a token it does not know, a model it does not have) is the operator's: the client hears that the remote cannot
serve, and the log hears why.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from gateway import errors

Kind: TypeAlias = Literal["gone", "busy", "declined"]
"""gone: no connection, or one that broke, or a server that cannot serve; another may, and this one later. busy: it
refuses for the time being, and said until when if it knows. declined: it answered, and will say the same again."""

_OURS = {
    401: "it does not know our token; check remote.token_file",
    403: "our token may not do this; check remote.token_file",
    404: "it has no such model; check remote.model and remote.version",
    405: "it is no inference server; check remote.url",
    501: "it does not do this; a decoupled model cannot be called as a remote one",
}
_STATUS = {1: 503, 3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 12: 501, 14: 503, 16: 401}


class Failure(Exception):
    """`error` is what the client is told, `reason` what the log is."""

    def __init__(self, kind: Kind, error: errors.GatewayError, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.error = error
        self.reason = reason


def unreachable(model: str, reason: str) -> Failure:
    """There is no connection, or not any more."""
    text = f"the remote server of model '{model}' cannot be reached; try again later"
    return Failure("gone", errors.Unavailable(text, 1.0), reason)


def of_status(model: str, code: int, text: str, retry_after: float | None = None) -> Failure:
    """An answer with this gRPC status code; see `of_http`."""
    return of_http(model, _STATUS.get(code, 500), text, retry_after)


def of_http(model: str, status: int, text: str, retry_after: float | None = None) -> Failure:
    """An answer with this HTTP status; `text` is the server's, `retry_after` in seconds if it said so."""
    reason = f"{status} {text}"
    if status == 429:
        return Failure("busy", errors.Overloaded(text, retry_after), reason)
    if status == 504:
        return Failure("declined", errors.DeadlineExceeded(text), reason)
    if status in _OURS or status in (502, 503) or 300 <= status < 400:
        why = _OURS.get(status, text)
        told = errors.Unavailable(f"the remote server of model '{model}' cannot serve it now", retry_after or 1.0)
        kind: Kind = "busy" if status == 503 and retry_after is not None else "gone"
        return Failure(kind, told, f"{status} {why}")
    if 400 <= status < 500:
        return Failure("declined", errors.InvalidArgument(text), reason)
    told_broken = errors.Internal(f"model '{model}' failed on its remote server; the log has what it said")
    return Failure("declined", told_broken, reason)
