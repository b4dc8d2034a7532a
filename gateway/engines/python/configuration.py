"""`pb_utils.ModelConfig`: what `auto_complete_config` is given to fill in, and the lookups in a configuration.

A configuration is a dictionary as Triton's JSON has it. What the file already says is never overruled: a model that
disagrees with it gets a ValueError, in Triton's words.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

Fields: TypeAlias = dict[str, Any]


class ModelConfig:
    """A model's configuration while the model completes it."""

    def __init__(self, model_config: str) -> None:
        """`model_config` is JSON."""
        self._fields: Fields = json.loads(model_config)

    def as_dict(self) -> Fields:
        """All of it."""
        return self._fields

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Set the largest batch. Raises ValueError where the file allows a larger one."""
        given = self._fields.get("max_batch_size", 0)
        if given > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {given}, but in auto-complete-config function for model "
                f"'{self._name}' specified max_batch_size {max_batch_size}"
            )
        self._fields["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """Let requests be joined. Raises ValueError where the file asks for another scheduler."""
        other = next((key for key in ("sequence_batching", "ensemble_scheduling") if key in self._fields), None)
        if other is not None:
            raise ValueError(
                f"Configuration specified scheduling_choice as '{other}', but auto-complete-config function for model "
                f"'{self._name}' tries to set scheduling_choice as 'dynamic_batching'"
            )
        self._fields.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, bool]) -> None:
        """Set `decoupled`. Raises ValueError for other keys, and where the file says otherwise."""
        if transaction_policy_dict.keys() - {"decoupled"}:
            raise ValueError(
                f"model transaction property in auto-complete-config function for model '{self._name}' contains property "
                "other than 'decoupled'."
            )
        given = self._fields.get("model_transaction_policy", {}).get("decoupled", False)
        wanted = transaction_policy_dict.get("decoupled", given)
        if given and not wanted:
            raise ValueError(
                "trying to change decoupled property in auto-complete-config function for model "
                f"'{self._name}', which is already set to '{given}'."
            )
        self._fields["model_transaction_policy"] = {"decoupled": wanted}

    def add_input(self, input: Fields) -> None:  # noqa: A002 - the name is Triton's
        """Add an input of `name`, `data_type`, `dims` and perhaps `optional`. Raises ValueError."""
        self._add("input", input, ("name", "data_type", "dims"), ("optional",))

    def add_output(self, output: Fields) -> None:
        """Add an output of `name`, `data_type` and `dims`. Raises ValueError."""
        self._add("output", output, ("name", "data_type", "dims"), ())

    @property
    def _name(self) -> str:
        return str(self._fields.get("name", ""))

    def _add(self, kind: str, new: Fields, required: Collection[str], optional: Collection[str]) -> None:
        where = f"{kind} '{new.get('name', '')}' in auto-complete-config function for model '{self._name}'"
        if new.keys() - {*required, *optional}:
            allowed = ", ".join(f"'{key}'" for key in (*required, *optional))
            raise ValueError(f"{where} contains property other than {allowed}.")
        for key in required:
            if key not in new:
                raise ValueError(f"{where} is missing '{key}' property.")
        listed: list[Fields] = self._fields.setdefault(kind, [])
        given = _by_name(listed, new["name"])
        if given is None:
            listed.append(dict(new))
        else:
            self._agree(kind, given, new)
            given.update(new)

    def _agree(self, kind: str, given: Fields, new: Fields) -> None:
        datatype = given.get("data_type", "TYPE_INVALID")
        if datatype not in ("TYPE_INVALID", new["data_type"]):
            raise ValueError(
                f"unable to load model '{self._name}', configuration expects datatype {datatype} for {kind} "
                f"'{new['name']}', model provides {new['data_type']}"
            )
        tensor = f"model '{self._name}', tensor '{new['name']}': the model expects"
        if given.get("dims") and list(given["dims"]) != list(new["dims"]):
            raise ValueError(f"{tensor} dims {new['dims']} but the model configuration specifies dims {given['dims']}")
        if given.get("optional", False) and not new.get("optional", True):
            raise ValueError(
                f"{tensor} optional {new['optional']} but the model configuration specifies optional {given['optional']}"
            )


def get_input_config_by_name(model_config: Fields, name: str) -> Fields | None:
    """What a configuration says of the input of this name; None if it has none."""
    return _by_name(model_config.get("input", []), name)


def get_output_config_by_name(model_config: Fields, name: str) -> Fields | None:
    """What a configuration says of the output of this name; None if it has none."""
    return _by_name(model_config.get("output", []), name)


def using_decoupled_model_transaction_policy(model_config: Fields) -> bool:
    """Whether the model may give any number of responses to a request."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def _by_name(tensors: Collection[Fields], name: str) -> Fields | None:
    return next((each for each in tensors if each.get("name") == name), None)
