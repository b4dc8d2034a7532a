"""Every key's name; the table at the head of `gateway.redis_client` says what is in it."""

from __future__ import annotations

GROUP = "workers"


class Keys:
    """The keys of one fleet. `prefix` has no braces: Redis Cluster would read them as a hash tag."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._fleet = f"{{{prefix}}}"
        self.processes = f"{self._fleet}:processes"
        self.models = f"{self._fleet}:models"
        self.events = f"{self._fleet}:events"
        self.wanted = f"{self._fleet}:wanted"
        self.stats = f"{self._fleet}:stats"

    def process(self, process: str) -> str:
        """The announcement of one process."""
        return f"{self._fleet}:p:{process}"

    def holding(self, process: str) -> str:
        """What one worker holds."""
        return f"{self._fleet}:h:{process}"

    def requests(self, model: str, version: str, klass: int) -> str:
        """The request stream of one class of a lane."""
        return f"{self.prefix}:q:{_lane(model, version)}:{klass}"

    def owned(self, model: str, version: str, process: str) -> str:
        """The request stream of the sequences of a lane that one worker has begun."""
        return f"{self.prefix}:q:{_lane(model, version)}:{process}"

    def sequence(self, model: str, version: str, identity: int | str) -> str:
        """What is known of one sequence. A number is another than the string of its digits."""
        kind = "s" if isinstance(identity, str) else "n"
        return f"{self.prefix}:s:{_lane(model, version)}:{kind}{identity}"

    def dead(self, model: str, version: str) -> str:
        """The dead letters of a lane."""
        return f"{self.prefix}:d:{_lane(model, version)}"

    def replies(self, process: str) -> str:
        """The reply stream of one gateway process."""
        return f"{self.prefix}:r:{process}"

    def payload(self, identity: str) -> str:
        """A payload kept beside the stream."""
        return f"{self.prefix}:b:{identity}"

    def idempotency(self, digest: str) -> str:
        """The record of one idempotency key."""
        return f"{self.prefix}:i:{digest}"

    def cached(self, digest: str) -> str:
        """One entry of the response cache."""
        return f"{self.prefix}:c:{digest}"

    def job(self, job: str) -> str:
        """The record of one async job."""
        return f"{self.prefix}:j:{{jobs}}:{job}"

    def jobs(self, state: str) -> str:
        """The index of the async jobs in one state."""
        return f"{self.prefix}:jobs:{{jobs}}:{state}"

    def job_events(self) -> str:
        """The changes of state of all async jobs."""
        return f"{self.prefix}:jobs:{{jobs}}:events"

    def job_hooks(self) -> str:
        """The webhooks that are to be delivered, by the time of the next attempt."""
        return f"{self.prefix}:jobs:{{jobs}}:hooks"

    def job_key(self, digest: str) -> str:
        """The job that an idempotency key stands for."""
        return f"{self.prefix}:jobs:{{jobs}}:key:{digest}"


def _lane(model: str, version: str) -> str:
    # A brace inside a name would end the hash tag early, and spread the lane over shards.
    name = model.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")
    return f"{{{name}/{version}}}"
