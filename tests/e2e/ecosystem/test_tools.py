"""Tools that others wrote for OpenAI's servers, run against ours as their users run them."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import trm
from tests.e2e.conftest import COMMANDS, ServerProcess, clean_environment
from training.problems.synthetic import parse_families, problems

REPOSITORY = Path(__file__).parents[3]


def run_tool(
    name: str, *arguments: str, cwd: Path, timeout: float, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a tool of the extra `tools` to its end."""
    environment = (
        clean_environment() | variables | {"OPENAI_API_KEY": "none", "HF_DATASETS_CACHE": str(cwd / "datasets")}
    )
    done = subprocess.run(
        [str(COMMANDS / name), *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment
    )
    return done


def test_lm_eval_scores_as_solve_answers(server: ServerProcess, tmp_path: Path) -> None:
    rows = [
        {"question": p.question, "answer": p.answer}
        for p in problems(parse_families("easy"), "heldout", seed=3, count=24)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    done = run_tool(
        "lm-eval",
        *("--model", "local-chat-completions", "--tasks", "boxed", "--include_path", str(REPOSITORY / "docs/lm_eval")),
        "--model_args",
        f"model=qwen-trm,base_url={server.url}/v1/chat/completions,num_concurrent=8",
        *("--apply_chat_template", "--output_path", "report"),
        cwd=tmp_path,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    [report] = (tmp_path / "report").rglob("results_*.json")
    score = json.loads(report.read_text())["results"]["boxed"]["exact_match,boxed"]
    questions = {"question": [row["question"] for row in rows]}
    results = httpx.post(f"{server.url}/solve", json=questions, timeout=120).json()["results"]
    solved = [result["answer"] == row["answer"] for result, row in zip(results, rows, strict=True)]
    assert score == pytest.approx(sum(solved) / len(rows))
    assert score > 0.8


def test_guidellm_gets_every_token_it_asked_for(server: ServerProcess, tmp_path: Path) -> None:
    done = run_tool(
        "guidellm",
        *("run", "--backend", f"kind=openai_http,target={server.url},model=qwen-trm"),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=16"),
        *("--tokenizer", f"kind=hf_auto,model={trm.bundled_model_path()}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=24"),
        *("--output", "kind=json,path=report.json", "--disable-console-interactive"),
        cwd=tmp_path,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == 16
    assert not requests["errored"]
    assert not requests["incomplete"]
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {24}


def test_schemathesis_finds_nothing_to_complain_about(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """Valid and invalid requests to all routes, all checks; few samples each, and no replies without end, for time."""
    limits = ("--max-n", "2", "--max-messages", "64", "--max-model-len", "200")
    server = start_server(*limits, "--api-key", "sesame")

    done = run_tool(
        "schemathesis",
        *("run", f"{server.url}/openapi.json", "--header", "Authorization: Bearer sesame"),
        *("--mode", "all", "--checks", "all", "--max-examples", "20", "--seed", "7", "--workers", "8"),
        *("--request-timeout", "120", "--max-response-time", "120", "--continue-on-failure", "--no-color"),
        cwd=tmp_path,
        timeout=900,
        SCHEMATHESIS_HOOKS="schemathesis_hooks",
        PYTHONPATH=str(Path(__file__).parent),
    )

    assert done.returncode == 0, done.stdout[-6000:]
    generated, passed = re.search(r"(\d+) generated, (\d+) passed", done.stdout).groups()  # type: ignore[union-attr]
    assert int(passed) > 500, generated
