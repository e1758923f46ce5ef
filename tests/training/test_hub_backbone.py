"""Training on a backbone named by its hub id: Qwen2.5-Math-1.5B's repository, with few and random weights.

The repository lies in a cache as the hub's client fills it (commits, a branch that points at one of them,
shards), and the client is offline, so that the id itself is what every command gets.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.conftest import randomize, shared_path
from training.checkpoints import STATE_TENSORS
from training.config import TrainSettings
from training.run import train
from training.trainer import Trainer
from trm import TRMForCausalLM, checkpoint
from trm.cache import Sequences
from trm.chat import ChatFormat, solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.errors import CheckpointError

pytestmark = pytest.mark.slow

HUB_ID = "Qwen/Qwen2.5-Math-1.5B-Instruct"
COMMITS = ("a" * 40, "b" * 40)
VOCABULARY = 151_936
CONFIG: dict[str, Any] = {  # the repository's config.json, key for key: older names than ours included
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 4096,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
IDS = torch.tensor([[151644, 872, 198, 3838, 374, 220, 17, 10, 17, 30, 151645]])
ROWS = [{"question": f"What is {n} plus {n}?", "answer": f"<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"} for n in range(4)]

Repository = Callable[..., Path]


def fill(directory: Path, changes: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    """Everything that the repository holds, with few and random weights in several shards."""
    config = CONFIG | changes
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**config)).to(dtype)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # repeated rows: 233 million normal numbers would take seconds
        rows = torch.randn(min(4096, len(parameter)), *parameter.shape[1:], generator=generator).to(dtype)
        repeats = -(-len(parameter) // len(rows))
        parameter.data.copy_((rows * 0.1).repeat(repeats, *[1] * (parameter.ndim - 1))[: len(parameter)])
    model.tie_weights()
    model.save_pretrained(directory, max_shard_size="200MB" if config["hidden_size"] > 64 else "10MB")
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 1
    (directory / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": False, "temperature": 1.0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    for file in shared_path("qwen2-tokenizer").iterdir():
        shutil.copyfile(file, directory / file.name)


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the client keeps what it has downloaded."""
    return tmp_path_factory.mktemp("huggingface") / "hub"


@pytest.fixture
def repository(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """Put a commit into the cache and let the branch `main` point at it; the client is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = hub_cache / f"models--{HUB_ID.replace('/', '--')}"

    def make(commit: str = COMMITS[0], dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> Path:
        snapshot = place / "snapshots" / commit
        fill(snapshot, SMALL | changes, dtype, seed)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        return snapshot

    yield make
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run on the hub's backbone that takes a second."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(**changes: Any) -> TrainSettings:
        small: dict[str, Any] = {
            "dataset": str(tmp_path / "rows.jsonl"), "backbone": HUB_ID, "backbone_dtype": "bfloat16",
            "output_dir": tmp_path / "run", "n_latent": 1, "n_cycles": 1, "n_supervision": 2,
            "epochs": 9, "max_steps": 2, "warmup_steps": 0, "num_threads": 1,
        }  # fmt: skip
        return TrainSettings(**(small | changes))

    return make


def state(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def backbone_states(model: TRMForCausalLM) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    rope = model.backbone.rope(torch.arange(IDS.shape[1])[None])
    return model.encode(model.backbone.embed_tokens(IDS), rope, Sequences(mask))[..., -1, :], rope


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_hub_id_gives_the_backbone_that_transformers_gives(repository: Repository, tied: bool) -> None:
    snapshot = repository(tie_word_embeddings=tied)
    theirs = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32)

    ours = checkpoint.read_backbone(HUB_ID)
    model = TRMForCausalLM.from_backbone(ours, n_latent=1, n_cycles=1, n_supervision=1)

    assert (ours.lm_head.weight is ours.embed_tokens.weight) == tied
    assert ours.config.rope_parameters["rope_theta"] == CONFIG["rope_theta"]
    assert torch.equal(ours.to_transformers()(IDS).logits, theirs(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-3, rtol=1e-4)  # P1
    assert model(IDS).logits.shape[-1] == VOCABULARY > len(checkpoint.read_tokenizer(HUB_ID))


def test_the_fingerprint_of_bfloat16_weights_is_the_same_in_every_type(repository: Repository) -> None:
    repository()

    prints = {
        checkpoint.fingerprint(checkpoint.read_backbone(HUB_ID, None, t)) for t in (torch.bfloat16, torch.float32)
    }

    assert len(prints) == 1


def test_masters_move_in_float32_over_a_bfloat16_backbone(repository: Repository, run: Any) -> None:
    """In bfloat16 a step of 1e-5 would be lost on weights of size 0.1."""
    repository()
    settings = run(lr=1e-5)
    model = TRMForCausalLM.from_backbone(
        checkpoint.read_backbone(HUB_ID, None, torch.bfloat16), n_latent=1, n_cycles=1, n_supervision=2
    )
    chat = ChatFormat(checkpoint.read_tokenizer(HUB_ID))
    examples = [chat.encode_example("What is 2 plus 2?", r"\boxed{4}")]
    trainer = Trainer(settings, model, chat, examples, "cpu")
    backbone = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    trainer.train_step()  # the zero-initialised projections hide the others from the first step
    masters = {name: tensor.detach().clone() for name, tensor in trainer.weights.parameters.items()}

    trainer.train_step()

    moments = [t for o in trainer.weights.optimizers for s in o.state.values() for t in s.values() if t.ndim]
    trained = [*trainer.weights.parameters.values(), *trainer.weights.ema.average.values()]
    assert {t.dtype for t in [*trained, *moments]} == {torch.float32}
    assert [name for name, tensor in trainer.weights.parameters.items() if torch.equal(tensor, masters[name])] == []
    assert {t.dtype for t in backbone.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, backbone[name]) for name, tensor in model.backbone.state_dict().items())


def test_states_of_a_bfloat16_backbone_enter_the_recursion_in_float32(repository: Repository) -> None:
    """So is the residual stream; rotary angles are not rounded."""
    repository()
    short, wide = (
        TRMForCausalLM.from_backbone(checkpoint.read_backbone(HUB_ID, None, dtype), n_supervision=1)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert {p.dtype for p in short.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in short.decoder.parameters()} == {torch.float32}

    (x, rope), (expected, exact) = backbone_states(short), backbone_states(wide)

    mask = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    residual = short.backbone(short.backbone.embed_tokens(IDS), rope, Sequences(mask))
    assert residual.dtype == x.dtype == torch.float32
    assert not torch.equal(residual, residual.bfloat16().float())
    assert torch.equal(x, F.rms_norm(residual, (residual.shape[-1],), eps=1e-6))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(rope, exact, strict=True))
    assert 0 < (x - expected).abs().max() < 0.1


def test_a_checkpoint_names_id_commit_and_fingerprint_and_answers(repository: Repository, run: Any) -> None:
    repository()
    last = train(run())
    config = state(last)

    model = TRMForCausalLM.from_pretrained(last)

    assert (config["backbone_source"], config["backbone_revision"]) == (HUB_ID, COMMITS[0])
    assert config["backbone_fingerprint"] == checkpoint.fingerprint(model.backbone)
    assert not (last / checkpoint.BACKBONE_DIR).exists()
    chat = ChatFormat(checkpoint.read_tokenizer(last))
    assert chat.end_id == CONFIG["eos_token_id"]
    engine = Engine(model, chat, EngineConfig(max_rows=2, max_model_len=128))
    engine.start()
    request = Request(tuple(chat.encode(solve_messages("What is 2 plus 2?"))), SamplingParams(max_tokens=3))
    try:
        assert len(engine.submit([request])[0].result().token_ids) > 0
    finally:
        engine.close()


def test_a_branch_that_moves_changes_nothing_for_a_run(repository: Repository, run: Any) -> None:
    repository()
    first = train(run(max_steps=1))
    repository(COMMITS[1], seed=1)

    last = train(TrainSettings(resume=first, max_steps=2))

    assert state(last)["backbone_revision"] == COMMITS[0]
    assert TRMForCausalLM.from_pretrained(last)


def test_a_commit_that_holds_other_weights_is_refused(repository: Repository, run: Any) -> None:
    snapshot = repository()
    last = train(run(max_steps=1))
    shutil.rmtree(snapshot)
    repository(seed=1)

    with pytest.raises(CheckpointError, match=rf"{HUB_ID}: the backbone's weights have fingerprint .* trained on"):
        TRMForCausalLM.from_pretrained(last)
    with pytest.raises(CheckpointError, match="another backbone"):
        train(TrainSettings(resume=last, max_steps=2))


def test_weights_rounded_for_training_are_served_rounded(repository: Repository, run: Any) -> None:
    repository(dtype=torch.float32)
    rounded = checkpoint.read_backbone(HUB_ID, None, torch.bfloat16).float().state_dict()

    served = TRMForCausalLM.from_pretrained(train(run()))

    assert all(torch.equal(tensor, rounded[name]) for name, tensor in served.backbone.state_dict().items())


def test_a_trained_head_is_a_copy_and_the_embedding_stays(repository: Repository, run: Any) -> None:
    repository()
    last = train(run(train_lm_head=True, lr=1e-3))

    model = TRMForCausalLM.from_pretrained(last)

    backbone = checkpoint.read_backbone(HUB_ID)
    assert torch.equal(model.backbone.embed_tokens.weight, backbone.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, backbone.embed_tokens.weight)
    trained = json.loads((last.parent / "run.json").read_text())["trained_parameters"]
    head = VOCABULARY * SMALL["hidden_size"]
    assert trained == head + sum(p.numel() for p in model.decoder.parameters())
    for file, copies in ((checkpoint.WEIGHTS_FILE, 1), (STATE_TENSORS, 3)):  # average; master and AdamW's two moments
        assert (last / file).stat().st_size == pytest.approx(4 * trained * copies, rel=1e-3)


def test_the_true_width_has_a_gradient_everywhere(repository: Repository) -> None:
    """One layer of hidden size 1536, 12 heads and 2 key/value heads of 128, vocabulary 151,936."""
    widths = ("hidden_size", "intermediate_size", "num_attention_heads")
    repository(**{name: CONFIG[name] for name in widths}, num_hidden_layers=1)
    backbone = checkpoint.read_backbone(HUB_ID, None, torch.bfloat16)
    model = randomize(TRMForCausalLM.from_backbone(backbone, n_latent=1, n_cycles=1, n_supervision=1))

    model(IDS, labels=IDS).loss.backward()

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 24_380_929
    assert model.config.head_dim == 128
    without = {name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0}
    assert without == {"decoder.halt_head.weight", "decoder.halt_head.bias"}  # they have a loss of their own


def test_the_documented_command(repository: Repository, hub_cache: Path, tmp_path: Path) -> None:
    repository()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [str(Path(sys.executable).parent / "trm-train"), "--backbone", HUB_ID, "--dataset", "rows.jsonl"]
    small = ["--n-latent=1", "--n-cycles=1", "--n-supervision=1", "--max-steps=1", "--num-threads=1", "--device=cpu"]
    offline = {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [*command, *small], cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stderr
    assert state(tmp_path / done.stdout.strip())["backbone_source"] == HUB_ID
