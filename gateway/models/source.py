"""The repository of models that settings describe, with what the engines know of model files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gateway import engines
from gateway.config.credentials import credentials
from gateway.config.environment import cache_folder
from gateway.config.locations import Location
from gateway.config.settings import Settings
from gateway.repository import Repository, Root


def open_repository(settings: Settings, gpus: Sequence[str]) -> Repository:
    """The repository; `gpus` are the usable GPUs by name. Reads nothing yet.

    Raises `InvalidArgument` when a remote repository needs a package that is not installed.
    """
    repository = Repository(
        _roots(settings),
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


def _roots(settings: Settings) -> list[Path | Root]:
    if not any(isinstance(place, Location) for place in settings.model_repository):
        return [place for place in settings.model_repository if isinstance(place, Path)]
    from gateway.repository.remote.cache import Cache
    from gateway.repository.remote.root import RemoteRoot
    from gateway.repository.remote.store import Store, connect, require_driver

    def sign_in(place: Location) -> Store:
        return connect(place, credentials(place))

    cache = Cache(settings.repository_cache_dir or cache_folder(), settings.repository_cache_bytes)
    roots: list[Path | Root] = []
    for place in settings.model_repository:
        if isinstance(place, Path):
            roots.append(place)
        else:
            require_driver(place)
            roots.append(RemoteRoot(place, cache, partial(sign_in, place), required=settings.exit_on_error))
    return roots
