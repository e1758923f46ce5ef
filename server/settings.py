"""What `trm-serve` can be told. Every knob here is read; `trm.settings` says from where."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import CliVariadicArg, NoDecode

from trm.errors import ConfigError
from trm.logs import LogFormat
from trm.settings import Settings, command_line, flag_of

BUNDLED_MODEL_ID = "qwen-trm"
DECODER_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]*(/[A-Za-z0-9_][A-Za-z0-9._:-]*)*", re.ASCII)

ApiKey = Annotated[str, Field(min_length=1)]
Bucket = Annotated[int, Field(ge=1)]
PublicPath = Annotated[str, Field(pattern=r"^/([^*]*|[^*]*/\*)$")]
RootPath = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*$")]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s*]+)$")]
LISTS = ("api_key", "public_paths", "cors_origins", "decoder", "row_buckets")  # flags that take several values at once
ELSEWHERE = {  # flags of vLLM and uvicorn
    "max_num_seqs": "it is --max-rows here",
    "max_num_batched_tokens": "it is --prefill-chunk here",
    "gpu_memory_utilization": "--kv-cache-bytes limits the cache",
    "num_speculative_tokens": "it is --max-draft-tokens here",
    "quantization": "it is --quantize here",
    "lora_modules": "a decoder on the same backbone is --decoder NAME=DIR",
    "allowed_origins": "it is --cors-origins here",
    "download_dir": "the hub's files lie where HF_HOME says",
    "chat_template": "it belongs to the model: chat_template.jinja in its directory",
    "seed": "requests have their own seed",
    **dict.fromkeys(("ssl_keyfile", "ssl_certfile"), "for TLS put a proxy in front (docs/serving.md)"),
    **dict.fromkeys(
        ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "workers"),
        "a server has one device; several servers share the work (docs/deploying.md)",
    ),
    **dict.fromkeys(("enable_auto_tool_choice", "tool_call_parser"), "leave it out: tools are always on"),
}


class ServeSettings(Settings):
    """Serve a model over HTTP: OpenAI's routes, POST /solve and a playground in the browser.

    trm-serve                                                  the bundled model, on http://127.0.0.1:8000
    trm-serve --model runs/mine/checkpoint-1000 --port 9000    a checkpoint of your own, on another port
    """

    command: ClassVar[str] = "trm-serve"
    elsewhere: ClassVar[Mapping[str, str]] = ELSEWHERE

    groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "model": ("model", "served_model_name", "decoder", "decoder_dir", "device", "dtype", "quantize", "num_threads"),
        "address": ("host", "port", "root_path", "cors_origins"),
        "keys": ("api_key", "api_key_file", "public_paths"),
        "engine": (
            "max_rows",
            "row_buckets",
            "max_model_len",
            "max_queue",
            "kv_cache_bytes",
            "prefill_chunk",
            "max_draft_tokens",
        ),
        "limits of one request": (
            "max_body_bytes",
            "max_body_fields",
            "max_n",
            "max_messages",
            "max_stop",
            "max_stop_chars",
        ),
        "time": (
            "request_timeout_seconds",
            "body_timeout_seconds",
            "max_step_seconds",
            "idle_connection_seconds",
            "keep_alive_seconds",
            "drain_seconds",
        ),
        "operation": ("exit_on_failure", "log_level", "log_format"),
    }

    model: str | None = Field(None, description="checkpoint directory or hub id; without it the bundled model")
    served_model_name: str | None = Field(None, description="the model's id in requests; by default --model as given")
    decoder: Annotated[list[str], NoDecode] = Field(
        [],
        description="NAME=DIR, as often as needed: a checkpoint on the same backbone, whose memory and calls it "
        "shares, and the id that requests call it by",
    )
    decoder_dir: Path | None = Field(
        None,
        description="directory of such checkpoints, which are served by their folders' names; with --api-key those "
        "below it can be loaded while the server runs",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 on cuda, and for large models on a CPU that computes it natively, else float32",
    )
    quantize: Literal["int8", "fp8"] | None = Field(
        None,
        description="the backbone's linear layers in 8 bits, int8 on a CPU and fp8 on a GPU of Hopper's kind or later: "
        "faster, and a hundredth off in each layer",
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads for decoding; by default torch chooses")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one and logs it")
    root_path: RootPath = Field(
        "",
        description="path prefix under which a proxy shows this server, such as /trm; the proxy may strip it or not",
    )
    cors_origins: Annotated[CliVariadicArg[list[Origin]], NoDecode] = Field(
        [], description="origins whose pages may use this server, such as https://example.org, or * for all"
    )

    api_key: Annotated[CliVariadicArg[list[ApiKey]], NoDecode] = Field(
        [],
        repr=False,
        description="keys, one of which every client must send as 'Authorization: Bearer KEY'; commas separate them in "
        "TRM_API_KEY; without any the server is open to all",
    )
    api_key_file: Path | None = Field(
        None, description="file with more keys, one a line; empty lines and lines that begin with # are ignored"
    )
    public_paths: Annotated[CliVariadicArg[list[PublicPath]], NoDecode] = Field(
        [],
        description="paths that need no key, such as /metrics, besides /health and /ready; "
        "/ and /playground/* open the playground's page, but its questions still need a key",
    )

    max_rows: int = Field(32, ge=1, description="requests decoded together")
    row_buckets: Annotated[CliVariadicArg[list[Bucket]], NoDecode] = Field(
        [],
        description="numbers of rows that calls of the model are filled up to, such as 1 8 32; by default 1, 2, 4, … "
        "on a GPU, where each is one launch, and none on a CPU; with a single one replies are the same to the bit in "
        "any company, at the price of calls that are always full",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="longest prompt plus reply in tokens; by default what model and memory allow"
    )
    max_queue: int = Field(256, ge=0, description="requests that may wait; further ones get 429")
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="memory for keys and values; by default at most a quarter of what is free"
    )
    prefill_chunk: int = Field(
        256, ge=1, description="prompt tokens that pass the backbone between two steps of the running rows"
    )
    max_draft_tokens: int = Field(
        7,
        ge=0,
        description="most tokens that the backbone drafts for the recursion to verify at once, where that is faster; "
        "0 for no drafts",
    )

    max_body_bytes: int = Field(2**20, ge=1, description="largest request body in bytes")
    max_body_fields: int = Field(4096, ge=1, description="most fields in all objects of a request body together")
    max_n: int = Field(64, ge=1, description="largest n of one request")
    max_messages: int = Field(512, ge=1, description="most messages of one conversation")
    max_stop: int = Field(16, ge=0, description="most stop strings of one request")
    max_stop_chars: int = Field(256, ge=1, description="longest stop string in characters")

    request_timeout_seconds: float = Field(
        600.0, ge=0, description="how long a request may take, queue included, before it gets 504; 0 for no limit"
    )
    body_timeout_seconds: float = Field(30.0, gt=0, description="how long a request's body may take to arrive")
    max_step_seconds: float = Field(
        300.0,
        ge=0,
        description="how long a step of the engine may take before its device counts as hanging; 0 for no limit",
    )
    idle_connection_seconds: int = Field(
        75,
        ge=1,
        description="how long a connection may stay open without a whole request, or without reading its reply",
    )
    keep_alive_seconds: float = Field(
        15.0, gt=0, description="how long a stream may be silent before it sends a comment line"
    )
    drain_seconds: float = Field(30.0, ge=0, description="how long a stopping server lets requests finish")

    exit_on_failure: bool = Field(
        False,
        description="exit with status 1 when the engine or its device fails, so that a supervisor restarts the server",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    log_format: LogFormat = Field("auto", description="auto: text on a terminal, else one JSON object a line")

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> Self:
        """As for every command, but a list that the shell left empty must not open the server to all."""
        given = command_line(argv)
        settings = super().from_command_line(given)
        for name in LISTS:
            flag = flag_of(name)
            if flag in (arg.partition("=")[0] for arg in given) and not getattr(settings, name):
                raise ConfigError(f"{flag} has no value; give it one, or leave it out")
        settings.keys()  # now, before a model is loaded
        settings.decoder_sources()
        return settings

    @field_validator(*LISTS, mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        """At commas; one in the name of a decoder's directory stays, unless a further NAME= follows."""
        comma = ",(?=[^,]*=)" if info.field_name == "decoder" else ","
        return [item.strip() for item in re.split(comma, value)] if isinstance(value, str) else value

    @field_validator("root_path", mode="before")
    @classmethod
    def _end(cls, value: Any) -> Any:
        return value.removesuffix("/") if isinstance(value, str) else value

    def keys(self) -> list[str]:
        """All keys that open the server; none if it is open. Raises ConfigError for a file that has none."""
        if self.api_key_file is None:
            return self.api_key
        try:
            lines = [line.strip() for line in self.api_key_file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise ConfigError(f"--api-key-file {self.api_key_file}: {reason}") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {self.api_key_file}: holds no key; add one, or leave the flag out")
        return [*self.api_key, *found]

    def decoder_sources(self) -> dict[str, str]:
        """Where the decoders lie that are served from the start, by the ids of requests.

        Raises ConfigError for what cannot be an id, for an id that two have, and for a folder that cannot be read.
        """
        given = [(f"--decoder {one}", *one.partition("=")[::2]) for one in self.decoder]
        if self.decoder_dir is not None:
            try:
                folders = sorted(path for path in self.decoder_dir.iterdir() if not path.name.startswith("."))
            except OSError as error:
                raise ConfigError(f"--decoder-dir {self.decoder_dir}: {error.strerror}") from None
            some = [path for path in folders if (path / "config.json").is_file()]
            given += [(f"--decoder-dir {self.decoder_dir}", path.name, str(path)) for path in some]
        found: dict[str, str] = {}
        for said, name, source in given:
            if not DECODER_ID.fullmatch(name) or not source:
                raise ConfigError(f"{said}: {name!r} must be a name of letters, digits and ._:/-, as in NAME=DIR")
            if name in found or name == self.model_id:
                raise ConfigError(f"{said}: {name!r} is the id of another model too; choose another name")
            found[name] = source
        return found

    def decoder_source(self, name: str) -> str | None:
        """Where the decoder of an id lies, if it may be loaded now: one of --decoder, or below --decoder-dir."""
        for one in self.decoder:
            known, _, source = one.partition("=")
            if name == known:
                return source
        if self.decoder_dir is None or not DECODER_ID.fullmatch(name):  # which no path out of the directory matches
            return None
        path = self.decoder_dir / name
        return str(path) if (path / "config.json").is_file() else None

    @property
    def model_id(self) -> str:
        """The name that requests call the model by."""
        return self.served_model_name or self.model or BUNDLED_MODEL_ID
