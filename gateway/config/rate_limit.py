"""`--rate-limit` and `--rate-limit-resource`, in Triton's form; see its user_guide/rate_limiter.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode

ResourceCounts: TypeAlias = dict[tuple[str, int | None], int]
"""How many there are of a resource, by its name and the number of a device; None stands for every device."""

_RESOURCE = re.compile(r"([^:]+):(\d+)(?::(\d+))?", re.ASCII)


def read_resources(entries: Iterable[str]) -> ResourceCounts:
    """The counts that operators give; of two for the same resource the last. Raises ValueError for another form."""
    counts: ResourceCounts = {}
    for entry in entries:
        found = _RESOURCE.fullmatch(entry)
        if found is None:
            raise ValueError(
                "--rate-limit-resource option format is '<resource_name>:<count>:<device>' or '<resource_name>:<count>'. "
                f"Got {entry}"
            )
        name, count, device = found.groups()
        counts[name, None if device is None else int(device)] = int(count)
    return counts


class RateLimits(BaseSettings):
    """The settings of rate limiting."""

    rate_limit: Literal["off", "execution_count"] = Field(
        "off",
        description="execution_count: an instance with rate_limiter resources runs only while they are free, those of high "
        "priority first; off: rate_limiter has no effect",
        json_schema_extra={"group": "models"},
    )
    rate_limit_resource: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="NAME:COUNT[:DEVICE], how many there are of a resource; the default is the most that an instance asks for; "
        "repeatable (variable: separated by ',')",
        json_schema_extra={"group": "models"},
    )

    @field_validator("rate_limit", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("rate_limit_resource", mode="before")
    @classmethod
    def _split_resources(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("rate_limit_resource")
    @classmethod
    def _in_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        read_resources(value)
        return value

    @model_validator(mode="after")
    def _one_worker(self) -> RateLimits:
        if self.rate_limit != "off" and getattr(self, "workers", 1) > 1:
            raise ValueError(
                "--rate-limit execution_count needs one worker process, for two would not know of each other's resources; "
                "give --workers 1"
            )
        return self
