"""`config.pbtxt` and its JSON form to and from Triton's `ModelConfig` protobuf message, with errors for people.

The schema is the one that ships in `tritonclient`; nothing is parsed by hand. Whether a message makes sense
is `check.py`'s question, not this module's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.config.hints import remedy
from gateway.config.model import ModelConfigProto
from gateway.errors import InvalidArgument, NoConfiguration

_TOKEN = re.compile(r"""\#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\w+""")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a configuration came from: the name errors call it by, and its text if it has lines to point at."""

    file: str
    text: str = ""

    def error(self, message: str, *words: str) -> InvalidArgument:
        """An error about the place that `words` lead to, e.g. `("input", "IN", "dims")`."""
        return InvalidArgument(self.describe(message, *words))

    def describe(self, message: str, *words: str) -> str:
        """`message` with the file, and the line if the text has the first of `words`, in front."""
        line, _ = self.place(words)
        return f"{self.file} line {line}: {message}" if line else f"{self.file}: {message}"

    def place(self, words: Sequence[str]) -> tuple[int, int]:
        """The line and column that `words` lead to, as far as the text has them in this order; 0, 0 if not the first."""
        place = 0, 0
        tokens = self._tokens()
        for word in words:
            start = next((at for token, at in tokens if token == word), None)
            if start is None:
                break
            place = self.text.count("\n", 0, start) + 1, start - self.text.rfind("\n", 0, start)
        return place

    def _tokens(self) -> Iterator[tuple[str, int]]:
        # A comment is one token, so that no word in it is taken for a field.
        for match in _TOKEN.finditer(self.text):
            yield match.group().strip("\"'"), match.start()


def empty() -> ModelConfigProto:
    """A message with nothing set, which is what an absent `config.pbtxt` means."""
    return _schema().ModelConfig()


def parse_text(source: Source) -> ModelConfigProto:
    """Read protobuf text. Raises `InvalidArgument` naming file, line, column and a remedy."""
    from google.protobuf import text_format

    proto = empty()
    try:
        text_format.Parse(source.text, proto)
    except text_format.ParseError as error:
        line, column = error.GetLine() or 1, error.GetColumn() or 1
        content = (source.text.splitlines() + [""] * line)[line - 1]
        problem = re.sub(r"^\d+:\d+ : ", "", str(error)).removeprefix(f"'{content}': ").rstrip(".")
        problem = problem.removeprefix("'': ")  # protobuf quotes an empty line at the end of the file
        problem = problem.replace('"inference.', '"')
        hint = remedy(str(error), source.text, content, _schema().DESCRIPTOR.pool)
        raise InvalidArgument(f"{source.file} line {line} column {column}: {problem}. {hint}") from None
    return proto


def parse_json(text: str) -> ModelConfigProto:
    """Read the JSON form, as a load request carries it; integers may be strings.

    Raises `NoConfiguration` saying what is wrong.
    """
    from google.protobuf import json_format

    if not text.lstrip().startswith("{"):
        raise NoConfiguration('model configuration: expected a JSON object, e.g. {"max_batch_size": 8}')
    try:
        return json_format.Parse(text, empty())
    except json_format.ParseError as error:
        problem = str(error).partition("\n")[0].rstrip(". ").replace('"inference.', '"')
        raise NoConfiguration(f"model configuration: {problem}") from None
    except RecursionError:
        raise NoConfiguration("model configuration: the JSON is nested too deeply") from None


def config_json(proto: ModelConfigProto) -> dict[str, Any]:
    """The message as Triton's `GET /v2/models/m/config` shows it.

    Every field without presence is there even when unset, 64-bit integers are numbers, enums are names, and
    the order is the schema's.
    """
    from google.protobuf import json_format

    values = json_format.MessageToDict(
        proto, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _ordered(values, proto.DESCRIPTOR)


def _ordered(values: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    return {field.name: _plain(values[field.name], field) for field in descriptor.fields if field.name in values}


def _plain(value: Any, field: Any) -> Any:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        return {key: _plain(item, message.fields_by_name["value"]) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, field) for item in value]
    if message is not None:
        return _ordered(value, message)
    # proto3 JSON writes 64-bit integers as strings.
    return int(value) if field.cpp_type in {field.CPPTYPE_INT64, field.CPPTYPE_UINT64} else value


def _schema() -> Any:
    # Importing tritonclient.grpc takes a quarter of a second, which --help and --version should not pay.
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2
