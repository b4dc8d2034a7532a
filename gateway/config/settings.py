"""The settings of the gateway process, from `GATEWAY_*` variables and the command line.

Names and defaults are tritonserver's where it has the setting, but for --exit-on-error: there one broken model
keeps the others from serving. Each field carries its help text and its group,
so that the command line (`arguments.py`) and the documentation have one source. Refuses what is unsafe or
contradicts itself; opens no file but to see that it is there.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FilePath, NonNegativeInt, PositiveInt, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from gateway.config.client_memory import check_client_memory
from gateway.config.locations import Places
from gateway.config.rate_limit import RateLimits
from gateway.config.restricted import checked_pattern, read_restricted
from gateway.config.trace import read_trace_config

MIB = 1 << 20
Port = Annotated[int, Field(ge=0, le=65535)]


def _setting(default: Any, group: str, description: str, **constraints: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **constraints)


class Settings(RateLimits):
    """One process's settings. Raises pydantic's `ValidationError`, a `ValueError`, for a bad or unsafe value."""

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", env_ignore_empty=True, frozen=True, extra="forbid")

    model_repository: Places = _setting(
        (), "models", "folder of models, or s3://, gs://, as://, hf://; repeat for several (variable: separated by ':')"
    )
    repository_cache_dir: Path | None = _setting(
        None, "models", "folder for the files of remote repositories (default: lockgate in the user's cache folder)"
    )
    repository_cache_bytes: PositiveInt = _setting(64 << 30, "models", "bytes in that folder, or as many as are in use")
    model_control_mode: Literal["none", "poll", "explicit"] = _setting(
        "none",
        "models",
        "none: load every model once; poll: follow changes in the folder; explicit: load on request, see --load-model",
    )
    load_model: Annotated[tuple[str, ...], NoDecode] = _setting(
        (), "models", "model to load at start in explicit mode; repeatable; '*' for all (variable: separated by ',')"
    )
    repository_poll_secs: PositiveInt = _setting(15, "models", "seconds between two looks at the folder in poll mode")
    disable_auto_complete_config: bool = _setting(
        False,
        "models",
        "load only models whose config.pbtxt lists inputs and outputs; fill in neither from the model file",
    )
    model_config_name: str = _setting(
        "", "models", "use configs/NAME.pbtxt of a model that has it", pattern=r"^[\w.-]*$"
    )
    default_max_batch_size: NonNegativeInt = _setting(
        4, "models", "max_batch_size of a model that can take batches and whose configuration leaves it open"
    )
    cpu_cores: NonNegativeInt = _setting(
        0, "models", "CPU cores that models run on; 0: all that this process may use, shared by --workers"
    )
    model_load_thread_count: PositiveInt = _setting(4, "models", "how many models are loaded side by side")
    default_deadline_ms: float = _setting(
        0.0,
        "models",
        "ms that a request has which brings no deadline; 0: any time; a model's parameter default_deadline_ms goes first",
        ge=0,
        lt=1e12,
    )
    response_cache_bytes: NonNegativeInt = _setting(
        0, "models", "bytes of responses kept for models with response_cache { enable: true }; 0: none"
    )
    idempotency_bytes: NonNegativeInt = _setting(
        64 * MIB, "models", "bytes of answers kept for requests that come again under their Idempotency-Key"
    )
    isolation: Literal["auto", "thread", "process"] = _setting(
        "auto",
        "models",
        "process: each instance in a child process; thread: in this one; auto: as each backend is used to; a model's "
        "parameter isolation goes first",
    )
    max_children: NonNegativeInt = _setting(
        0, "models", "child processes from which on small CPU models share one; 0: four for each core"
    )
    persist_latency: bool = _setting(
        True, "models", "keep what was learned of batch times in each version's folder, for the next start"
    )
    strict_readiness: bool = _setting(True, "models", "ready only when every model is ready")
    exit_on_error: bool = _setting(
        False, "models", "exit when a model fails to load at start; without it the others serve"
    )
    exit_timeout_secs: NonNegativeInt = _setting(30, "server", "seconds that a stop waits for accepted requests")
    server_id: str = _setting(
        "triton", "server", "the server's name in metadata; some Triton clients insist on 'triton'"
    )
    startup_table: Literal["gateway", "triton"] = _setting(
        "gateway",
        "server",
        "how the models are shown once they are loaded: with what each runs on, or as tritonserver does",
    )

    queue: str = _setting(
        "memory",
        "queue",
        "memory: gateway and models in this process; embedded: a Redis of its own on this machine; or a URL: "
        "redis://, rediss://, unix://, redis+sentinel://, redis+cluster://",
        pattern=r"^(memory|embedded|[a-z+]+://.+)$",
    )
    role: Literal["all", "gateway", "worker"] = _setting(
        "all", "queue", "gateway: take requests and load no model; worker: run models and listen nowhere; all: both"
    )
    http_workers: PositiveInt = _setting(
        1, "queue", "processes that take requests, HTTP and gRPC, on the same ports; needs a queue between processes"
    )
    workers: PositiveInt = _setting(1, "queue", "processes that run models; needs a queue between processes")
    queue_prefix: str = _setting(
        "lockgate", "queue", "begins every key in Redis; one for each fleet", pattern=r"^[^{}\s]+$"
    )
    queue_dir: Path | None = _setting(
        None,
        "queue",
        "folder in which the embedded Redis keeps its data and its socket (redis.sock); without it async jobs end with it",
    )
    queue_username: str = _setting("", "queue", "user name at Redis")
    queue_password_file: FilePath | None = _setting(None, "queue", "file with the password at Redis")
    queue_ca_file: FilePath | None = _setting(
        None, "queue", "PEM file of the authority that Redis' certificate is from"
    )
    queue_key_file: FilePath | None = _setting(
        None, "queue", "file with a key of 16 bytes or more; messages are signed with it, and none is read that is not"
    )
    job_ttl_secs: PositiveInt = _setting(3600, "async jobs", "seconds that a job is kept once it has ended")
    max_jobs: PositiveInt = _setting(10_000, "async jobs", "jobs that are kept at once, ended ones included")
    webhook_allow: Annotated[tuple[str, ...], NoDecode] = _setting(
        (),
        "async jobs",
        "HOST[:PORT] for https, or http://HOST[:PORT], that jobs may call back; or a network such as 10.0.0.0/8 that such "
        "hosts may be in; repeatable (variable: separated by ',')",
    )
    queue_shared_memory: bool = _setting(
        True, "queue", "payloads over 256 KiB go through /dev/shm where both ends share it, not through Redis"
    )
    share_ports: bool = _setting(
        False, "queue", "let other gateways on this machine listen on the same ports; the kernel spreads the callers"
    )

    # What a supervisor tells the processes that it starts.
    http_fd: NonNegativeInt | None = _setting(
        None, "process", "descriptor of an open socket that listens, instead of --http-address and --http-port"
    )
    metrics_fd: NonNegativeInt | None = _setting(None, "process", "the same for metrics")
    status_fd: NonNegativeInt | None = _setting(
        None, "process", "descriptor to write a line of JSON to when ready, and when about to leave its ports"
    )
    process_name: str = _setting("", "process", "name of this process, in each line of its log")

    allow_http: bool = _setting(True, "http", "serve HTTP")
    http_address: str = _setting("127.0.0.1", "http", "address to listen on")
    http_port: Port = _setting(8000, "http", "port to listen on; 0 for any free one")
    http_max_input_size: PositiveInt = _setting(
        64 * MIB, "http", "bytes of JSON, of a raw binary body and of a decompressed body"
    )
    http_tls_cert: FilePath | None = _setting(None, "http", "PEM file of the certificate chain; turns TLS on")
    http_tls_key: FilePath | None = _setting(None, "http", "PEM file of the certificate's private key")

    http_restricted_api: Annotated[tuple[str, ...], NoDecode] = _setting(
        (), "http", "APIS:KEY=VALUE: groups of APIs that need this header; repeatable (variable: separated by ';')"
    )
    http_header_forward_pattern: str = _setting(
        "", "http", "which headers become request parameters: a regular expression"
    )

    allow_grpc: bool = _setting(True, "grpc", "serve gRPC")
    grpc_address: str = _setting("127.0.0.1", "grpc", "address to listen on")
    grpc_port: Port = _setting(8001, "grpc", "port to listen on; 0 for any free one")
    grpc_use_ssl: bool = _setting(False, "grpc", "use TLS; needs --grpc-server-cert and --grpc-server-key")
    grpc_use_ssl_mutual: bool = _setting(
        False, "grpc", "also demand a certificate from clients; needs --grpc-root-cert"
    )
    grpc_server_cert: FilePath | None = _setting(None, "grpc", "PEM file of the certificate chain")
    grpc_server_key: FilePath | None = _setting(None, "grpc", "PEM file of the certificate's private key")
    grpc_root_cert: FilePath | None = _setting(
        None, "grpc", "PEM file of the authority that clients' certificates are from"
    )
    grpc_keepalive_time: PositiveInt = _setting(7_200_000, "grpc", "ms without traffic until the server pings a client")
    grpc_keepalive_timeout: PositiveInt = _setting(20_000, "grpc", "ms that a ping may stay unanswered")
    grpc_keepalive_permit_without_calls: bool = _setting(False, "grpc", "ping also while no call is open")
    grpc_http2_max_pings_without_data: NonNegativeInt = _setting(
        2, "grpc", "pings without data in between; 0: any number"
    )
    grpc_http2_min_recv_ping_interval_without_data: NonNegativeInt = _setting(
        300_000, "grpc", "ms that a client must leave between two pings"
    )
    grpc_http2_max_ping_strikes: NonNegativeInt = _setting(
        2, "grpc", "bad pings until the connection is closed; 0: any number"
    )
    grpc_max_connection_age: NonNegativeInt = _setting(0, "grpc", "ms that a connection may live; 0: for ever")
    grpc_max_connection_age_grace: NonNegativeInt = _setting(
        0, "grpc", "ms that its open calls then have to finish; 0: any time"
    )
    grpc_infer_response_compression_level: Literal["none", "low", "medium", "high"] = _setting(
        "none", "grpc", "compress answers: low with gzip, others with deflate; grpcio serves then"
    )
    grpc_restricted_protocol: Annotated[tuple[str, ...], NoDecode] = _setting(
        (),
        "grpc",
        "APIS:KEY=VALUE: groups of APIs that need metadata triton-grpc-protocol-KEY; repeatable (variable: separated by ';')",
    )
    grpc_header_forward_pattern: str = _setting(
        "", "grpc", "which metadata become request parameters: a regular expression"
    )

    allow_metrics: bool = _setting(True, "metrics", "serve Prometheus metrics at /metrics")
    metrics_address: str = _setting("", "metrics", "address to listen on; the default is --http-address")
    metrics_port: Port = _setting(8002, "metrics", "port to listen on; 0 for any free one")
    allow_gpu_metrics: bool = _setting(True, "metrics", "read the GPUs, for metrics and for their health")
    allow_cpu_metrics: bool = _setting(True, "metrics", "report the CPU, its limits and its energy")
    metrics_interval_ms: PositiveInt = _setting(2000, "metrics", "ms between two looks at the GPUs")

    token_file: FilePath | None = _setting(
        None, "safety", "file with a line 'tenant:token' for each caller; requests must carry a token"
    )
    tenant_header: str = _setting(
        "",
        "safety",
        "header or metadata in which a trusted proxy names the tenant; a token's name goes first",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
    )
    allow_python_models: bool = _setting(
        False, "safety", "load models of backend python, which run whatever code is in their model.py"
    )
    allow_client_shm: bool = _setting(
        False, "safety", "let clients of this machine pass tensors in shared memory that they register"
    )
    client_shm_redis: str = _setting(
        "", "safety", "URL of a Redis for tensors of clients, by keys; with --allow-client-shm"
    )
    insecure: bool = _setting(False, "safety", "listen beyond this machine although nobody has to show a token")
    max_request_bytes: PositiveInt = _setting((1 << 31) - 1, "safety", "bytes of one request")
    max_inflight_bytes: PositiveInt = _setting(1024 * MIB, "safety", "bytes of all accepted requests together")
    max_request_tensors: PositiveInt = _setting(256, "safety", "inputs, and outputs, of one request")
    max_tensor_elements: PositiveInt = _setting(1 << 28, "safety", "elements of one tensor")
    max_json_depth: PositiveInt = _setting(100, "safety", "levels of nesting in JSON")
    max_connections: PositiveInt = _setting(1000, "safety", "open connections of each listener")

    log_format: Literal["text", "json"] = _setting("text", "logging", "text for people, json for machines")
    log_info: bool = _setting(True, "logging", "write INFO lines: starts, loads, failures that were mended")
    log_warning: bool = _setting(True, "logging", "write WARNING lines: refusals, and what to look after")
    log_error: bool = _setting(True, "logging", "write ERROR lines")
    log_file: Path | None = _setting(None, "logging", "file to which lines are added, in place of standard error")
    log_verbose: NonNegativeInt = _setting(0, "logging", "0: starts, loads, failures, refusals; 1: more")
    trace_config: Annotated[tuple[str, ...], NoDecode] = _setting(
        (),
        "logging",
        "what is traced, as Triton has it: level=TIMESTAMPS|TENSORS, rate=N, count=N, mode=triton|opentelemetry, "
        "triton,file=PATH, triton,log-frequency=N, opentelemetry,url=URL, opentelemetry,resource=K=V; repeatable (variable: separated by ';')",
    )
    log_access: bool = _setting(False, "logging", "log a line for every request")
    record: Path | None = _setting(
        None, "logging", "folder to write arrivals to, for gateway simulate; nothing is recorded without it"
    )
    record_inputs: bool = _setting(False, "logging", "record the tensors too, a .npz file for each request")
    record_sample: float = _setting(1.0, "logging", "share of the requests that is recorded", gt=0, le=1)
    record_max_bytes: PositiveInt = _setting(256 * MIB, "logging", "bytes to record at most")

    @field_validator("load_model", "webhook_allow", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("trace_config", "http_restricted_api", "grpc_restricted_protocol", mode="before")
    @classmethod
    def _split_entries(cls, value: Any) -> Any:
        return value.split(";") if isinstance(value, str) else value

    @field_validator("trace_config")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        read_trace_config(value)
        return value

    @field_validator("http_restricted_api", "grpc_restricted_protocol")
    @classmethod
    def _known_apis(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        read_restricted(value)
        return value

    @field_validator("http_header_forward_pattern", "grpc_header_forward_pattern")
    @classmethod
    def _regular(cls, value: str) -> str:
        return checked_pattern(value)

    @field_validator("response_cache_bytes", mode="before")
    @classmethod
    def _read_cache_config(cls, value: Any) -> Any:
        """Triton's form, `local,size=N`, too."""
        if not isinstance(value, str) or "," not in value:
            return value
        kind, _, option = value.partition(",")
        if kind != "local" or not option.startswith("size="):
            raise ValueError("must be a number of bytes, or local,size=N as in Triton's --cache-config")
        return option.removeprefix("size=")

    @model_validator(mode="before")
    @classmethod
    def _worker_listens_nowhere(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values | {"allow_http": False, "allow_grpc": False} if values.get("role") == "worker" else values

    @model_validator(mode="before")
    @classmethod
    def _follow_http_address(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("metrics_address"):
            return values
        default = cls.model_fields["http_address"].default
        return values | {"metrics_address": values.get("http_address", default)}

    @model_validator(mode="after")
    def _agree(self) -> Settings:
        if self.load_model and self.model_control_mode != "explicit":
            raise ValueError(
                "--load-model needs --model-control-mode explicit; in the other modes every model is loaded"
            )
        if "*" in self.load_model and len(self.load_model) > 1:
            raise ValueError("--load-model '*' loads every model; give it alone")
        if (self.http_tls_cert is None) != (self.http_tls_key is None):
            raise ValueError("--http-tls-cert and --http-tls-key belong together; give both or neither")
        if self.grpc_use_ssl and (self.grpc_server_cert is None or self.grpc_server_key is None):
            raise ValueError("--grpc-use-ssl needs --grpc-server-cert and --grpc-server-key")
        if self.webhook_allow and self.queue_key_file is None:
            raise ValueError("--webhook-allow needs --queue-key-file FILE, whose key webhooks are signed with")
        if self.record_inputs and self.record is None:
            raise ValueError("--record-inputs needs --record DIR")
        if self.grpc_use_ssl_mutual and (not self.grpc_use_ssl or self.grpc_root_cert is None):
            raise ValueError("--grpc-use-ssl-mutual needs --grpc-use-ssl and --grpc-root-cert")
        return self

    @model_validator(mode="after")
    def _fleet(self) -> Settings:
        if not self.model_repository and self.role != "gateway":
            raise ValueError("--model-repository (or GATEWAY_MODEL_REPOSITORY) must be given")
        if self.queue == "memory" and (self.role != "all" or self.workers > 1 or self.http_workers > 1):
            raise ValueError(
                "one process with --queue memory is all that there can be; give --queue embedded on one machine, or the "
                "URL of a Redis"
            )
        if self.queue == "memory" and self.queue_dir is not None:
            raise ValueError("--queue-dir is where the embedded Redis keeps its data; it needs --queue embedded")
        several = self.http_workers > 1 or self.share_ports
        if self.allow_client_shm and several and (self.queue == "memory" or not self.queue_shared_memory):
            raise ValueError(
                "--allow-client-shm needs one process that takes requests, or processes that tell each other what clients "
                "register: --queue embedded or a Redis, and --queue-shared-memory, by which they know that they are on one host"
            )
        check_client_memory(self.client_shm_redis, self.queue_prefix, allowed=self.allow_client_shm)
        if self.queue == "embedded" and self.role != "all":
            raise ValueError("--queue embedded starts gateways and workers itself; a role needs the URL of a Redis")
        return self

    @property
    def exposed(self) -> list[tuple[str, str]]:
        """The flags of the addresses that other machines can reach, each with its address."""
        return [
            (f"--{name}-address", address)
            for name, allowed, address in (
                ("http", self.allow_http, self.http_address),
                # A client certificate says who calls as well as a token does.
                ("grpc", self.allow_grpc and not self.grpc_use_ssl_mutual, self.grpc_address),
                ("metrics", self.allow_metrics, self.metrics_address),
            )
            if allowed and not _loopback(address)
        ]

    @model_validator(mode="after")
    def _safe(self) -> Settings:
        if self.insecure or self.token_file is not None:
            return self
        if self.exposed:
            flag, address = self.exposed[0]
            raise ValueError(
                f"{flag} {address} can be reached from other machines, and anyone there could use the gateway. Give "
                "--token-file FILE so that callers must show a token, or --insecure if the network is closed"
            )
        return self


def _loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False  # a host name may mean any address
