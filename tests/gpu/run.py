"""Run the tests of a GPU and the measurements, and leave one JSON file.

    python -m tests.gpu.run [gpu.json]

On an H100 it is meant to take less than eight minutes. It was never run on a GPU so far. Without one it runs to the end
at tiny sizes on the CPU, so that mistakes in it are found, and says so in the file: these numbers mean nothing.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.gpu import measures
from trm import bundled_model_path
from trm.bench.settings import SHAPES
from trm.chat import ChatFormat
from trm.checkpoint import read_tokenizer
from trm.linear import has_fp8
from trm.loading import load_for_decoding

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TESTS_S = 200  # at most
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
MODELS = {
    "0.5B, 12 calls a token": ("qwen2.5-0.5b", {"n_latent": 2, "n_cycles": 1, "n_supervision": 4}),
    "1.5B, 336 calls a token": ("qwen2.5-1.5b", {"n_latent": 6, "n_cycles": 3, "n_supervision": 16}),
}
ROWS = (1, 8, 32, 128) if ON_GPU else (1, 3)
CONTEXT = 384 if ON_GPU else 40
TOKENS = 32 if ON_GPU else 3


def tests() -> Any:
    """What pytest says."""
    environment = os.environ if ON_GPU else os.environ | {"TRM_TEST_DEVICE": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TESTS_S, check=False)
    return {"status": done.returncode, "end": done.stdout.splitlines()[-30:]}


def bundled() -> Any:
    """The bundled model: replies, and how far bfloat16 is from float32."""
    chat = ChatFormat(read_tokenizer(bundled_model_path()))
    wide, narrow = (load_for_decoding(None, device=DEVICE, dtype=dtype) for dtype in ("float32", "bfloat16"))
    return {
        "agreement of bfloat16 with float32": measures.agreement(wide, narrow, chat, *((32, 64) if ON_GPU else (2, 6))),
        "replies": [
            {"dtype": name, **measures.replies(model, chat, rows, 6, TOKENS)}
            for name, model in (("float32", wide), ("bfloat16", narrow))
            for rows in ROWS
        ],
    }


def shape(name: str, quantize: str | None = None) -> Any:
    """A shape with random weights: its calls, and whole replies at its effort."""
    sizes, depth = MODELS[name]
    chat = ChatFormat(read_tokenizer(bundled_model_path()))
    model = measures.random_model(SHAPES[sizes] if ON_GPU else TINY, depth, DEVICE, quantize)
    effort = depth["n_supervision"]
    tokens = max(3, TOKENS * 4 // effort)  # deep ones take long
    many = ROWS[-1]
    found = {
        "calls": measures.calls(model, ROWS, CONTEXT),
        "replies": [
            *[measures.replies(model, chat, rows, effort, tokens) for rows in ROWS],
            measures.replies(model, chat, min(32, many), effort, tokens, temperature=0.7, seed=1),
            measures.replies(model, chat, min(32, many), effort, tokens, temperature=0.7, top_p=0.95, seed=1),
            measures.replies(model, chat, 1, effort, tokens, max_draft_tokens=7),
        ],
    }
    del model
    if ON_GPU:
        torch.cuda.empty_cache()
    return found


def main() -> None:
    """Every section, one after the other; one that fails does not stop the others."""
    out, began = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu.json"), time.perf_counter()
    report: dict[str, Any] = {
        "measured_on_a_gpu": ON_GPU,
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU, at tiny sizes: these numbers mean nothing",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    sections: dict[str, Callable[[], Any]] = {"tests": tests, "bundled model": bundled}
    for name in MODELS:
        sections[name] = lambda name=name: shape(name)
        if has_fp8(torch.device(DEVICE)):
            sections[f"{name}, fp8"] = lambda name=name: shape(name, "fp8")
    for name, section in sections.items():
        started = time.perf_counter()
        try:
            report[name] = section()
        except Exception:  # noqa: BLE001 - whatever it was, the rest is measured
            report[name] = {"failed": traceback.format_exc().splitlines()}
        report.setdefault("seconds", {})[name] = round(time.perf_counter() - started, 1)
        print(f"{time.perf_counter() - began:6.1f} s  {name}: {json.dumps(report[name])[:300]}", flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, found in report.items() if isinstance(found, dict) and found.get("failed")]
    if failed or report["tests"].get("status"):
        sys.exit(f"{out}: {', '.join(failed) or 'tests'} failed")


if __name__ == "__main__":
    main()
