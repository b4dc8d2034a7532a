"""The error table: one row a class, complete, and equal to Triton's but where we say so (PROTOCOL.md section 1)."""

import inspect
from pathlib import Path

import pytest

from gateway import errors

ROOT = Path(__file__).parents[2]
ROWS = {  # class: (gRPC status, HTTP status, retryable, reason)
    "InvalidArgument": (3, 400, False, ""),
    "NoConfiguration": (3, 400, False, ""),
    "NotFound": (5, 404, False, ""),
    "AlreadyExists": (6, 400, False, ""),
    "Conflict": (6, 409, False, "conflict"),
    "Unsupported": (12, 501, False, ""),
    "Unavailable": (14, 503, True, "unavailable"),
    "QueueFull": (14, 503, True, "queue_full"),
    "QueueTimeout": (14, 503, True, "queue_timeout"),
    "ResourceExhausted": (8, 429, True, "bytes"),
    "Overloaded": (8, 429, True, "overload"),
    "Shed": (8, 429, True, "shed"),
    "DeadlineExceeded": (4, 504, False, "expired"),
    "DeadlineTooShort": (4, 504, False, "deadline"),
    "Cancelled": (1, 400, False, ""),
    "Internal": (13, 500, False, ""),
    "Crashed": (13, 500, False, "crashed"),
    "Quarantined": (13, 500, False, "quarantined"),
    "SequenceLost": (10, 409, False, "sequence_lost"),
    "Unauthenticated": (16, 401, False, ""),
    "PermissionDenied": (7, 403, False, ""),
    "MethodNotAllowed": (12, 405, False, ""),
}
STATUS = {
    8: "RESOURCE_EXHAUSTED",
    4: "DEADLINE_EXCEEDED",
    14: "UNAVAILABLE",
    6: "ALREADY_EXISTS",
    10: "ABORTED",
    13: "INTERNAL",
}
ARGUMENTS = {
    "str": "x",
    "int": 1,
    "bool": True,
    "Sequence[str]": ["x"],
    "Sequence[int]": [1],
    "float": 1.5,
    "float | None": 1.5,
}


def classes():
    return [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.GatewayError)]


def builders():
    public = [f for name, f in inspect.getmembers(errors, inspect.isfunction) if not name.startswith("_")]
    return [function for function in public if function.__module__ == "gateway.errors"]


def test_every_class_is_a_row_and_every_row_a_class():
    found = {each.__name__: (each.grpc, each.http, each.retryable, each.reason) for each in classes()}
    del found["GatewayError"]
    assert found == ROWS


def table(text):
    """The rows of the table of refusals in a text: reason to (HTTP, gRPC, retry)."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): (int(row[2]), row[3], row[4]) for row in rows if len(row) == 5}


@pytest.mark.parametrize("text", [errors.__doc__, (ROOT / "README.md").read_text()], ids=["docstring", "README"])
def test_every_refusal_is_documented_as_it_is(text):
    wanted = {
        each.reason: (each.http, STATUS[each.grpc], "yes" if each.retryable else "no")
        for each in classes()
        if each.reason
    }
    assert table(text) == wanted


@pytest.mark.parametrize("kind", classes())
def test_when_to_try_again_is_known_or_not(kind):
    assert kind("text").retry_after is None
    assert kind("text", 0.25).retry_after == 0.25


def test_those_refused_for_their_bytes_are_spread_out():
    waits = {errors.too_many_bytes("full").retry_after for _ in range(20)}
    assert len(waits) > 10
    assert all(0.5 <= wait <= 1 for wait in waits)


@pytest.mark.parametrize("kind", classes())
def test_an_error_carries_its_text(kind):
    error = kind("what was wrong")
    assert error.message == "what was wrong"
    assert str(error) == "what was wrong"


@pytest.mark.parametrize("builder", builders())
def test_every_builder_gives_an_error_with_a_text_or_a_prefix(builder):
    arguments = {name: ARGUMENTS[p.annotation] for name, p in inspect.signature(builder).parameters.items()}
    built = builder(**arguments)
    assert type(built).__name__ == inspect.signature(builder).return_annotation
    text = built.message if isinstance(built, errors.GatewayError) else built
    assert text
    assert "{" not in text


TEXTS = [
    (errors.unknown_model("foo"), "Request for unknown model: 'foo' is not found"),
    (errors.unknown_version("m", "99"), "Request for unknown model: 'm' version 99 is not found"),
    (errors.version_not_ready("m", "1"), "Request for unknown model: 'm' version 1 is not at ready state"),
    (errors.no_versions("m"), "Request for unknown model: 'm' has no available versions"),
    (
        errors.bad_version("x"),
        (
            "failed to get model version from specified version string 'x' (details: stol), "
            "version should be an integral value > 0"
        ),
    ),
    (
        errors.reserved_parameter(),
        "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified.",
    ),
    (errors.deadline_passed(), "Request timeout expired"),
    (errors.queue_full("", None), "[request id: <id_unknown>] Exceeds maximum queue size"),
    (errors.queue_full("r", 1.0), "[request id: r] Exceeds maximum queue size"),
    (errors.queue_timeout(None), "Request timeout expired"),
    (errors.stopping(), "Server not ready"),
]


@pytest.mark.parametrize(("error", "text"), TEXTS)
def test_texts_that_clients_match_on(error, text):
    assert error.message == text


def test_the_prefix_names_the_request():
    assert errors.request_prefix("r-1") == "[request id: r-1] "
    assert errors.request_prefix("") == "[request id: <id_unknown>] "
