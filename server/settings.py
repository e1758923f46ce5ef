"""What `trm-serve` can be told. Every knob here is read; `trm.settings` says from where."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator
from pydantic_settings import CliVariadicArg, NoDecode

from trm.errors import ConfigError
from trm.settings import Settings

BUNDLED_MODEL_ID = "qwen-trm"

ApiKey = Annotated[str, Field(min_length=1)]


class ServeSettings(Settings):
    """Settings of `trm-serve`."""

    command: ClassVar[str] = "trm-serve"

    model: str | None = Field(None, description="checkpoint directory or hub id; without it the bundled model")
    served_model_name: str | None = Field(None, description="the model's id in requests; by default --model as given")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one and logs it")
    api_key: Annotated[CliVariadicArg[list[ApiKey]], NoDecode] = Field(
        [],
        description="keys that clients send as 'Authorization: Bearer KEY', separated by commas in TRM_API_KEY; "
        "without any the server is open",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: float32 on cpu, bfloat16 on cuda")
    num_threads: int | None = Field(None, ge=1, description="CPU threads that decode; default torch's")
    max_rows: int = Field(32, ge=1, description="requests decoded together")
    max_model_len: int | None = Field(
        None, ge=2, description="longest prompt plus reply in tokens; by default what model and memory allow"
    )
    max_queue: int = Field(256, ge=0, description="requests that may wait; beyond it they get 429")
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="memory for keys and values; by default at most a quarter of what is free"
    )
    max_draft_tokens: int = Field(
        7,
        ge=0,
        description="tokens that the backbone may draft for the recursion to verify at once, where that pays; "
        "0 for none",
    )
    max_body_bytes: int = Field(2**20, ge=1, description="largest request body")
    max_body_fields: int = Field(
        4096, ge=1, description="most fields that the objects of a request body may have together"
    )
    max_n: int = Field(64, ge=1, description="largest n of one request")
    max_messages: int = Field(512, ge=1, description="most messages of one conversation")
    max_stop: int = Field(16, ge=0, description="most stop strings of one request")
    max_stop_chars: int = Field(256, ge=1, description="longest stop string")
    keep_alive_seconds: float = Field(15.0, gt=0, description="a stream that says nothing for so long sends a comment")
    request_timeout_seconds: float = Field(
        600.0, ge=0, description="how long a request may take, queue included, before it gets 504; 0 for no limit"
    )
    drain_seconds: float = Field(30.0, ge=0, description="how long a stopping server lets requests finish")
    exit_on_failure: bool = Field(
        False, description="exit with status 1 when the engine or its device has failed, for a supervisor to restart"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> Self:
        """As for every command, but a key that the shell left empty must not open the server to all."""
        given = list(sys.argv[1:] if argv is None else argv)
        settings = super().from_command_line(given)
        times = sum(arg.partition("=")[0] == "--api-key" for arg in given)
        if times > 1:
            raise ConfigError(f"--api-key is given {times} times; give it once, with all keys behind it")
        if times and not settings.api_key:
            raise ConfigError("--api-key has no key behind it; leave it out to serve without keys")
        return settings

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: Any) -> Any:
        return [key.strip() for key in value.split(",")] if isinstance(value, str) else value

    @property
    def model_id(self) -> str:
        """The name that requests call the model by."""
        return self.served_model_name or self.model or BUNDLED_MODEL_ID
