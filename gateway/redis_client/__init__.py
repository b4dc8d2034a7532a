"""Redis: connections, timeouts, and every key name. The only package that knows any of them.

Keys and what is in them. P is the prefix (`--queue-prefix`); a hash tag, in braces, puts keys on one shard of a Redis
Cluster. Ids and field names are UTF-8.

| key                           | type   | what                                                                             |
|-------------------------------|--------|----------------------------------------------------------------------------------|
| `{P}:p:<process>`             | string | announcement of one process, msgpack; 2 s to live, refreshed every 250 ms        |
| `{P}:h:<process>`             | string | what a worker holds: pools with their configurations, msgpack; 10 min to live    |
| `{P}:processes`               | hash   | process id to role; whoever notices that one is dead removes it                  |
| `{P}:models`                  | hash   | every model announced and not withdrawn by a repository, to the process; no TTL  |
| `{P}:wanted`                  | hash   | model to the last load or unload command for it, which outlives --load-model     |
| `{P}:events`                  | stream | broadcasts to every process: commands, cancels, questions; MAXLEN ~ 10000        |
| `{P}:stats`                   | hash   | process id to its last statistics, msgpack                                       |
| `P:q:{<model>/<version>}:1..3`| stream | requests of a lane by class, 1 first; consumer group `workers`                   |
| `P:q:{<model>/<version>}:<process>` | stream | requests of the sequences a worker has begun; group `workers`, 10 min to live |
| `P:s:{<model>/<version>}:<id>`| hash   | one sequence: `s` its last beginning and by whom, and of that beginning the worker |
| `P:d:{<model>/<version>}`     | stream | dead letters of a lane                                                           |
| `P:r:<process>`               | stream | replies to one gateway process; MAXLEN ~ 10000, lives as long as its heartbeat   |
| `P:b:<id>`                    | string | a payload beside the stream; lives as long as its request                        |
| `P:i:<digest>`                | string | a run under an idempotency key, 3 s to live and renewed; its answer, 5 min       |
| `P:c:<digest>`                | string | response cache entry, written as an answer to a key is; an hour to live          |
| `P:j:{jobs}:<job>`            | hash   | one async job, fields in `gateway.jobs.record`; has a TTL                        |
| `P:jobs:{jobs}:<state>`       | zset   | async jobs by state: when they may run, when their lease ends, when they ended   |
| `P:jobs:{jobs}:hooks`         | zset   | webhooks to deliver, by the time of the next attempt                             |
| `P:jobs:{jobs}:events`        | stream | changes of state of all jobs; MAXLEN ~ 10000, plain XREAD                        |
| `P:jobs:{jobs}:key:<digest>`  | string | the job that an idempotency key stands for; has a TTL                            |

`RedisClient` promises: commands go out in the order they were called, in as few pipelines as there are loop turns; a
command is sent at most once, so a lost connection fails it with `Disconnected` and says nothing of whether it ran;
one caller's failure or cancellation is nobody else's. What is large goes by `bulk`, so that nothing waits behind it. Replies are RESP2's: bytes, int, None and lists of those.
"""

from gateway.redis_client.client import Reader, RedisClient
from gateway.redis_client.keys import Keys
from gateway.redis_client.options import RedisOptions
from gateway.redis_client.wire import Disconnected, unheeded

__all__ = ["Disconnected", "Keys", "Reader", "RedisClient", "RedisOptions", "unheeded"]
