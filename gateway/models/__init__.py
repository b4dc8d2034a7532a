"""The folder of models as the settings say it is to be read, and the commands `gateway models ...`."""

from gateway.models.keep import keep_models as keep_models
from gateway.models.source import open_repository as open_repository
