"""Sole reader and writer of weights.

A checkpoint is a directory: `config.json`, `model.safetensors` (what training owns, the
EMA weights), `backbone/` (the frozen backbone, where it is small enough to copy; else
`config.json` names its source, revision and fingerprint), tokenizer and chat template.
Everything is safetensors or JSON, nothing is ever unpickled, and files are written
aside and renamed. Whatever is missing, truncated, foreign or inconsistent raises
CheckpointError with the file and the reason.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from trm import gguf_file
from trm.backbone import Backbone
from trm.config import BACKBONES, TRMConfig
from trm.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
BACKBONE_DIR = "backbone"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = {TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja"}
STRUCTURE = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
MAX_COPIED_BACKBONE_BYTES = 64 * 2**20
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt"]  # of the files that the hub is asked for


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: configuration, the decoder's tensors, the frozen backbone."""

    config: TRMConfig
    weights: dict[str, Tensor]
    backbone: Backbone


@dataclass(frozen=True)
class Stored:
    """What the weight files of a checkpoint hold, those of its backbone included.

    parameters: numbers in them. digest: SHA-256 in hex of the decoder's file and the backbone's fingerprint.
    """

    parameters: int
    size_bytes: int
    digest: str


class Hub(TypedDict, total=False):
    """How to ask the hub, in the names of huggingface_hub's `snapshot_download`."""

    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool
    token: str | bool | None


def locate(model: str | Path, revision: str | None = None, hub: Hub | None = None) -> Path:
    """The local directory of a path or hub id. Raises CheckpointError where there is none."""
    path = Path(model).expanduser()
    if path.is_dir():
        _refuse_run(path)
        return path
    if path.suffix == ".gguf" and not path.exists():
        raise CheckpointError(f"{model}: no such file")
    if path.exists():
        hint = "; a GGUF file can be the backbone of one: trm-train --backbone" if path.suffix == ".gguf" else ""
        raise CheckpointError(f"{path}: is a file; a model is a directory with {CONFIG_FILE}{hint}")
    if _old(path).is_dir():
        raise CheckpointError(
            f"{model}: no such directory, because a write to it was cut short; its last whole copy is {_old(path)}: "
            "rename that, or write again"
        )
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise CheckpointError(f"{model}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=PATTERNS, **(hub or {})))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{model}: no such directory, and it could not be read from the hub: {reason}") from error


def _refuse_run(directory: Path) -> None:
    """Raise CheckpointError for what holds the checkpoints of a run and is none."""
    if (directory / CONFIG_FILE).exists():
        return
    checkpoints = [path.parent for path in directory.glob(f"checkpoint-*/{CONFIG_FILE}")]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: (len(path.name), path.name))
        raise CheckpointError(f"{directory}: is the directory of a run; give a checkpoint of it: {newest}")


def read(
    model: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32, hub: Hub | None = None
) -> Loaded:
    """Read a checkpoint directory or hub id, backbone included, in `dtype`; the decoder's own weights in float32."""
    directory = locate(model, revision, hub)
    config = read_config(directory)
    weights = read_decoder(directory)
    if (directory / BACKBONE_DIR).is_dir():
        backbone = read_backbone(directory / BACKBONE_DIR, None, dtype)
    elif config.backbone_source is not None:
        backbone = _read_recorded(config, hub)
        if config.backbone_fingerprint is not None and config.backbone_fingerprint != (found := fingerprint(backbone)):
            raise CheckpointError(
                f"{config.backbone_source}: the backbone's weights have fingerprint {found}, "
                f"but {directory} was trained on {config.backbone_fingerprint}; get that revision"
            )
        backbone.to(dtype)
    else:
        raise CheckpointError(f"{directory / BACKBONE_DIR}: missing, and {CONFIG_FILE} names no backbone_source")
    check_structure(directory, config, backbone)
    return Loaded(config, weights, backbone)


def read_decoder(directory: Path) -> dict[str, Tensor]:
    """The tensors that training owns, of a checkpoint directory, in float32."""
    weights = read_tensors(directory / WEIGHTS_FILE)
    _check_finite(weights, directory / WEIGHTS_FILE)
    return {name: tensor.float() for name, tensor in weights.items()}


def check_structure(directory: Path, config: TRMConfig, backbone: Backbone) -> None:
    """Raise CheckpointError unless a checkpoint's sizes are those of the backbone."""
    for name in STRUCTURE:
        ours, theirs = getattr(config.backbone_config, name, None), getattr(backbone.config, name, None)
        if ours != theirs:
            raise CheckpointError(
                f"{directory / CONFIG_FILE}: {name} is {ours} in backbone_config, {theirs} in the backbone"
            )


def backbone_identity(directory: Path, config: TRMConfig) -> str | None:
    """The fingerprint of a checkpoint's backbone as files hold it; None where its source was recorded without."""
    if (directory / BACKBONE_DIR).is_dir():
        return fingerprint(read_backbone(directory / BACKBONE_DIR, None, None))
    return config.backbone_fingerprint


def stored(directory: Path, config: TRMConfig, identity: str | None) -> Stored:
    """What lies in a checkpoint directory, and in what it names as its backbone; `identity`: of the backbone."""
    copy = directory / BACKBONE_DIR
    place = copy if copy.is_dir() else locate_backbone(str(config.backbone_source), config.backbone_revision)[0]
    files = [directory / WEIGHTS_FILE, *_shard_files(place)]
    parameters = sum(
        math.prod(shard.get_slice(name).get_shape())
        for shard in (_open(files[0]), *_shards(place))
        for name in shard.keys()  # noqa: SIM118 - no mapping
    )
    with files[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update((identity or "").encode())
    return Stored(parameters, sum(file.stat().st_size for file in files), digest.hexdigest())


def _read_recorded(config: TRMConfig, hub: Hub | None) -> Backbone:
    """The backbone that a configuration names, rounded as in training; a file in bfloat16 needs no rounding."""
    source, revision = config.backbone_source, config.backbone_revision
    assert source is not None, "the caller has looked"
    shards = _shards(locate_backbone(source, revision, hub)[0])
    stored = {shard.get_slice(name).get_dtype() for shard in shards for name in shard.keys()}  # noqa: SIM118 - no mapping
    recorded = config.backbone_config.dtype or torch.float32
    exact = stored == {"BF16"} and recorded in (torch.bfloat16, torch.float32, torch.float64)
    return read_backbone(source, revision, torch.bfloat16 if exact else recorded, hub)


def is_recursive(directory: Path) -> bool:
    """Whether a model directory is a checkpoint of ours, and no plain causal model."""
    return bool(read_json(directory / CONFIG_FILE).get("model_type") == TRMConfig.model_type)


def read_config(directory: Path) -> TRMConfig:
    """The configuration of a checkpoint directory."""
    path = directory / CONFIG_FILE
    content = read_json(path)
    if content.get("model_type") != TRMConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {content.get('model_type')!r}, not {TRMConfig.model_type!r}; "
            "trm-train makes a decoder for it"
        )
    try:
        return TRMConfig.from_dict(content)  # type: ignore[no-any-return]
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # the library validates with many kinds of error
        raise CheckpointError(f"{path}: not a usable configuration: {error}") from error


def read_backbone(
    source: str | Path,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    hub: Hub | None = None,
) -> Backbone:
    """A Qwen2, Qwen3 or Llama from a directory, hub id or GGUF file, in `dtype`; None: as stored, quantized in float32.

    A checkpoint of ours stands for the backbone that lies inside it. What needs no other type stays a window into
    its file until somebody moves it.
    """
    place, config = locate_backbone(source, revision, hub)
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{place}: the weights are quantized; take the model as it was before")
    stored = [(name, shard) for shard in _shards(place) for name in shard.keys()]  # noqa: SIM118 - no mapping
    # Files of a model without a head leave out the prefix.
    tensors = {n if n.startswith(("model.", "lm_head.")) else f"model.{n}": (n, shard) for n, shard in stored}
    try:
        with torch.device("meta"):
            backbone = Backbone(config)
    except Exception as error:  # whatever a configuration of numbers that do not fit each other leads to
        raise CheckpointError(f"{place}: the backbone does not load: {error}") from error
    shapes = backbone.hub_shapes()

    def shape_of(name: str) -> tuple[int, ...]:
        own_name, shard = tensors[name]
        return tuple(shard.get_slice(own_name).get_shape())

    wrong = sorted(name for name, shape in shapes.items() if name not in tensors or shape_of(name) != shape)
    if wrong:
        raise CheckpointError(f"{place}: {len(wrong)} tensors are missing or misshapen, {wrong[0]} first")

    def read(name: str) -> Tensor:
        own_name, shard = tensors[name]
        tensor = shard.get_tensor(own_name)
        _check_finite({name: tensor}, place)
        return tensor  # type: ignore[no-any-return]

    backbone.load_hub_tensors(read, dtype)
    config.dtype = backbone.dtype
    return backbone.eval()


def _shards(place: Path) -> list[Any]:
    """The open files of a backbone."""
    return [gguf_file.GGUFFile(place)] if place.is_file() else [_open(file) for file in _shard_files(place)]


def _shard_files(place: Path) -> list[Path]:
    """The only file of a backbone, or those that a directory's index names."""
    if place.is_file():
        return [place]
    whole, index = place / WEIGHTS_FILE, place / f"{WEIGHTS_FILE}.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise CheckpointError(f"{place}: no {WEIGHTS_FILE} file; only safetensors weights are read, and GGUF files")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files")
    return [place / name for name in sorted(set(names.values()))]


def read_backbone_config(source: str | Path, revision: str | None = None) -> Any:
    """The configuration of what `read_backbone` reads, without its weights."""
    return locate_backbone(source, revision)[1]


def locate_backbone(source: str | Path, revision: str | None = None, hub: Hub | None = None) -> tuple[Path, Any]:
    """Directory or GGUF file, and configuration, of a backbone."""
    if (path := Path(source).expanduser()).is_file():
        return path, gguf_file.GGUFFile(path).config
    directory = locate(source, revision, hub)
    path = directory / CONFIG_FILE
    architecture = read_json(path).get("model_type")
    if architecture == TRMConfig.model_type and (directory / BACKBONE_DIR).is_dir():
        return locate_backbone(directory / BACKBONE_DIR, None)
    if architecture not in BACKBONES:
        raise CheckpointError(
            f"{path}: backbone architecture {architecture!r} is not supported; supported: {', '.join(BACKBONES)}"
        )
    try:
        return directory, AutoConfig.from_pretrained(directory)  # a local directory  # nosec B615
    except Exception as error:  # the library validates with many kinds of error
        raise CheckpointError(f"{directory}: the backbone does not load: {error}") from error


def read_tokenizer(model: str | Path, revision: str | None = None) -> Any:
    """The fast tokenizer of a checkpoint or backbone, as its tokenizer.json or GGUF file says, but it cuts and pads
    nothing.

    AutoTokenizer would take the class that belongs to the backbone's architecture, and with it that
    class's idea of how text is split.
    """
    if (path := Path(model).expanduser()).is_file():
        return gguf_file.read_tokenizer(path)
    directory = locate(model, revision)
    if not (directory / TOKENIZER_FILE).is_file():
        raise CheckpointError(f"{directory / TOKENIZER_FILE}: missing")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)  # a local directory  # nosec B615
    except Exception as error:  # as above
        raise CheckpointError(f"{directory / TOKENIZER_FILE}: not a usable tokenizer: {error}") from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with _open(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def check_tensors(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: str) -> None:
    """Raise CheckpointError unless names and shapes are exactly as expected."""
    for name in sorted(set(expected) | set(weights)):
        if name not in weights:
            raise CheckpointError(f"{source}: tensor {name} is missing from {WEIGHTS_FILE}")
        if name not in expected:
            raise CheckpointError(f"{source}: tensor {name} in {WEIGHTS_FILE} does not belong to this model")
        if weights[name].shape != expected[name]:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {tuple(weights[name].shape)}; "
                f"{CONFIG_FILE} makes it {tuple(expected[name])}"
            )


def _check_finite(weights: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError where every request would fail at decoding, or training at its first step."""
    for name, tensor in weights.items():
        # The extremes are not finite if any number is not; one pass finds them, thirty times as fast as isfinite().
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(
                f"{source}: tensor {name} holds numbers that are not finite; "
                "the file is damaged or its training diverged: take another checkpoint"
            )


def write(
    directory: Path, config: TRMConfig, weights: Mapping[str, Tensor], backbone: Backbone, tokenizer: Any = None
) -> None:
    """Write a checkpoint beside `directory` and rename it into place; an existing one is replaced.

    Of what lies there a tokenizer stays, unless one is given.
    Backbones from a hub id or larger than 64 MB stay where they are; `config` must then name them.
    """
    directory = directory.absolute()
    if directory.exists() and not _may_be_replaced(directory):
        raise CheckpointError(
            f"{directory}: exists and is not a checkpoint of this program, so it is not replaced; choose another place"
        )
    aside = make_aside(directory)
    write_into(aside, config, weights, backbone, tokenizer)
    if tokenizer is None:
        for file in filter(Path.is_file, (directory / name for name in TOKENIZER_FILES)):
            shutil.copy2(file, aside)
    replace_directory(aside, directory)


def _may_be_replaced(path: Path) -> bool:
    """Whether nothing is lost that `write` has not written: an empty directory, a tokenizer, or a checkpoint."""
    if not path.is_dir():
        return False
    try:
        names = {file.name for file in path.iterdir()}
        return names <= TOKENIZER_FILES or is_recursive(path)
    except CheckpointError:
        return False


def make_aside(directory: Path) -> Path:
    """A new, empty directory beside `directory`, to be renamed to it when it is complete."""
    settle(directory)
    aside = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot write there: {error.strerror}") from error
    return aside


def write_into(
    directory: Path, config: TRMConfig, weights: Mapping[str, Tensor], backbone: Backbone, tokenizer: Any
) -> None:
    """The files of a checkpoint, into an existing directory that nobody reads yet."""
    if config.backbone_source is None:
        write_backbone(directory / BACKBONE_DIR, backbone)
    write_tensors(directory / WEIGHTS_FILE, weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    config.architectures = ["TRMForCausalLM"]
    config.backbone_config._name_or_path = ""  # a path of this machine; what matters of it is backbone_source
    config.save_pretrained(directory)  # last: a directory with a configuration is complete


def write_backbone(directory: Path, backbone: Backbone) -> None:
    """Copy a backbone in bfloat16 if that loses nothing, else as it is."""
    needed = backbone.hub_shapes()  # without a tied head
    tensors = {name: tensor for name, tensor in backbone.hub_tensors() if name in needed}
    short = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    exact = all(torch.equal(short[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())
    directory.mkdir(exist_ok=True)
    write_tensors(directory / WEIGHTS_FILE, short if exact else tensors)
    backbone.config.save_pretrained(directory)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, written aside and renamed."""
    aside = path.with_name(f".{path.name}.partial")
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(content, aside, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    _let_others_read(aside)
    os.replace(aside, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON file, written aside and renamed."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _let_others_read(path: Path) -> None:
    """Give a file the mode of any other new file; the safetensors writer makes it private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def replace_directory(aside: Path, directory: Path) -> None:
    """Rename `aside` to `directory`; an older one there is moved out of the way first, then removed.

    Killed anywhere, it leaves a whole copy at `directory`, or at the older one's place, from where `settle` takes it.
    """
    settle(directory)
    old = _old(directory)
    if directory.exists():
        os.rename(directory, old)
    try:
        os.rename(aside, directory)
    except OSError:
        if old.exists():
            os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def settle(directory: Path) -> None:
    """Put back what a killed `replace_directory` had moved out of the way, unless it had got as far as the new copy."""
    old = _old(directory)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.rename(old, directory)


def _old(directory: Path) -> Path:
    """Where an older copy stands while a newer one takes its place."""
    return directory.with_name(f".{directory.name}.old")


def backbone_record(source: str | Path, revision: str | None, backbone: Backbone) -> dict[str, str | None]:
    """The configuration fields that say where a backbone comes from; all None where it is small enough to be copied.

    A GGUF file is never copied: it may be a fraction of what its weights take here.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        weights = path / BACKBONE_DIR if (path / BACKBONE_DIR).is_dir() else path
        if sum(file.stat().st_size for file in weights.glob("*.safetensors")) <= MAX_COPIED_BACKBONE_BYTES:
            return {"backbone_source": None, "backbone_revision": None, "backbone_fingerprint": None}
        source = weights.resolve()
    elif path.is_file():
        source = path.resolve()
    else:
        revision = locate(source, revision).name  # the commit: a branch moves
    return {
        "backbone_source": str(source),
        "backbone_revision": revision,
        "backbone_fingerprint": fingerprint(backbone),
    }


def fingerprint(backbone: Backbone) -> str:
    """First 16 hex digits of a SHA-256 over the backbone's tensors, names and values, in float32.

    Computed once: 0.5 B weights take seconds. A tied head counts twice, as it did in the first checkpoints.
    """
    known = backbone.fingerprints
    if backbone.dtype not in known:
        digest = hashlib.sha256()
        for name, tensor in sorted(backbone.hub_tensors()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        known[backbone.dtype] = digest.hexdigest()[:16]
    return known[backbone.dtype]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: truncated or not safetensors: {error}") from error
