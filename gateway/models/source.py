"""The repository of models that settings describe, with what the engines know of model files."""

from __future__ import annotations

from collections.abc import Sequence

from gateway import engines
from gateway.config.settings import Settings
from gateway.repository import Repository


def open_repository(settings: Settings, gpus: Sequence[str]) -> Repository:
    """The repository; `gpus` are the usable GPUs by name. Reads nothing yet."""
    repository = Repository(
        settings.model_repository,
        engines.describe,
        gpus=[int(name.removeprefix("gpu:")) for name in gpus],
        default_max_batch_size=settings.default_max_batch_size,
        config_name=settings.model_config_name,
        caches=settings.response_cache_bytes > 0 or settings.role == "worker",  # the gateways of a fleet may
    )
    repository.allow_remote(engines.remote_configuration)
    if settings.allow_python_models:
        repository.allow_python(engines.auto_complete)
    if settings.rate_limit == "execution_count":
        repository.limit_rates()
    if settings.disable_auto_complete_config:
        repository.require_complete()
    return repository
