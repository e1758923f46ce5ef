"""Ways of decoding the same prompts greedily, past the end token, each to run in a process of its own.

This module is light, and a way imports only what it runs on: the peak memory of its process is its own.
"""

import ctypes
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trm.errors import ConfigError, TRMError

STATUS = Path("/proc/self/status")
CLOSE_S = 5.0  # that a process may take to end by itself


@dataclass(frozen=True)
class Job:
    """A prompt, and how many tokens to decode behind it."""

    prompt_ids: Sequence[int]
    max_tokens: int


@dataclass(frozen=True)
class Run:
    """For each job its tokens, and when each came, in seconds from the start."""

    ids: list[list[int]]
    times: list[list[float]]

    @property
    def seconds(self) -> float:
        """How long it all took."""
        return max(times[-1] for times in self.times)

    @property
    def tokens_per_s(self) -> float:
        """Prompts included."""
        return sum(map(len, self.ids)) / self.seconds

    @property
    def decoding_tokens_per_s(self) -> float:
        """From the moment on when every job has its first token."""
        began = max(times[0] for times in self.times)
        return sum(at > began for times in self.times for at in times) / (self.seconds - began)


Decode = Callable[[Sequence[Job]], Run]


@dataclass(frozen=True)
class Memory:
    """Bytes of a process in memory, files that it reads in place included."""

    peak: int
    resident: int

    @classmethod
    def own(cls) -> "Memory":
        """Of this process, so far and now."""
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return cls(*(1024 * int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS")))


# --- the ways ------------------------------------------------------------------------------------


def ours(directory: str, effort: int, **how: Any) -> Decode:
    """The engine with as many rows as there are jobs. Nobody drafts; nothing stays from one run for the next."""
    from trm.bench.workload import load
    from trm.engine import Engine, EngineConfig, Event, Request, SamplingParams

    model, chat = load(directory, **how)

    def decode(jobs: Sequence[Job]) -> Run:
        requests = [
            Request(tuple(job.prompt_ids), SamplingParams(job.max_tokens, n_supervision=effort, ignore_eos=True))
            for job in jobs
        ]
        longest = max(request.positions for request in requests)
        engine = Engine(model, chat, EngineConfig(len(jobs), longest, max_draft_tokens=0))
        run = _empty(jobs)
        failed: list[TRMError] = []

        def note(index: int, event: Event) -> None:
            run.ids[index] += event.token_ids
            run.times[index] += [time.perf_counter() - started] * len(event.token_ids)
            if event.error is not None:
                failed.append(event.error)

        started = time.perf_counter()
        engine.submit(requests, note)
        while engine.step():
            pass
        if failed:
            raise failed[0]
        return run

    return decode


def transformers(source: str, dtype: str, num_threads: int) -> Decode:
    """The backbone alone through `generate()`: one static batch, padded on the left, as long as its longest reply."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    from trm.bench.workload import padded_left
    from trm.checkpoint import locate_backbone, read_backbone

    torch.set_num_threads(num_threads)
    place, _ = locate_backbone(source)
    model: Any
    if place.is_file():  # GGUF, of which transformers' own reader loses some; the copy is in the peak of memory
        model = read_backbone(place, None, getattr(torch, dtype)).to_transformers()
    else:
        model = AutoModelForCausalLM.from_pretrained(  # a local directory  # nosec B615
            place, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    model.generation_config = GenerationConfig()  # no penalties and no end token, whatever the directory suggests

    class Clock(StoppingCriteria):
        """Notes when each token comes; stops nothing."""

        def __init__(self) -> None:
            self.started = time.perf_counter()
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.times.append(time.perf_counter() - self.started)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def decode(jobs: Sequence[Job]) -> Run:
        ids, mask = padded_left([job.prompt_ids for job in jobs])
        longest, clock = max(job.max_tokens for job in jobs), Clock()
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=longest,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        replies = out[:, ids.shape[1] :].tolist()
        assert len(clock.times) == longest, "nothing ends before the longest reply does"
        return Run(
            [reply[: job.max_tokens] for reply, job in zip(replies, jobs, strict=True)],
            [clock.times[: job.max_tokens] for job in jobs],
        )

    return decode


def llama_cpp(gguf: str, num_threads: int) -> Decode:
    """llama.cpp: all prompts, then one batch for each token, of the sequences that are not at their end.

    Each sequence has keys and values of its own, which llama.cpp decodes faster than one table for all.
    """
    import llama_cpp as lib
    import numpy as np

    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(gguf.encode(), lib.llama_model_default_params())
    if not model:
        raise ConfigError(f"--gguf {gguf}: llama.cpp does not load it")
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(jobs: Sequence[Job]) -> Run:
        settings = lib.llama_context_default_params()
        positions = max(len(job.prompt_ids) + job.max_tokens for job in jobs)
        settings.n_ctx, settings.n_seq_max = len(jobs) * (-(-positions // 256) * 256), len(jobs)
        settings.n_threads = settings.n_threads_batch = num_threads
        context = lib.llama_init_from_model(model, settings)
        batch = lib.llama_batch_init(settings.n_batch, 0, 1)
        run = _empty(jobs)

        def call(places: Sequence[tuple[int, int, int, bool]]) -> None:
            """Pass (token, position, job, whether a token is wanted), and note the tokens that come."""
            assert silent is not None, "the library calls it"
            for index, (token, position, job, wanted) in enumerate(places):
                batch.token[index], batch.pos[index] = token, position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, job
                batch.logits[index] = wanted
            batch.n_tokens = len(places)
            if status := lib.llama_decode(context, batch):
                raise ConfigError(f"llama.cpp failed with status {status}")
            for index, (_, _, job, wanted) in enumerate(places):
                if wanted:
                    logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, index), (vocabulary,))
                    run.ids[job].append(int(logits.argmax()))
            now = time.perf_counter() - started
            for _, _, job, wanted in places:
                if wanted:
                    run.times[job].append(now)

        started = time.perf_counter()
        prompts = [
            (token, position, index, position == len(job.prompt_ids) - 1)
            for index, job in enumerate(jobs)
            for position, token in enumerate(job.prompt_ids)
        ]
        for start in range(0, len(prompts), settings.n_batch):
            call(prompts[start : start + settings.n_batch])
        while left := [index for index, job in enumerate(jobs) if len(run.ids[index]) < job.max_tokens]:
            ends = [len(jobs[index].prompt_ids) + len(run.ids[index]) - 1 for index in left]
            call([(run.ids[index][-1], end, index, True) for index, end in zip(left, ends, strict=True)])
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return run

    return decode


def _empty(jobs: Sequence[Job]) -> Run:
    return Run([[] for _ in jobs], [[] for _ in jobs])


# --- a process for each --------------------------------------------------------------------------


class Way:
    """A process that loads one way, then runs jobs when it is told to. `load` must be picklable.

    Raises ConfigError with the reason where the way fails or its process dies.
    """

    def __init__(self, name: str, load: Callable[[], Decode]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, load), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, jobs: Iterable[Job]) -> tuple[Run, Memory]:
        """Decode the jobs; and what memory the process has taken until then."""
        try:
            self._connection.send(list(jobs))
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ConfigError(f"{self.name}: its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise ConfigError(f"{self.name}: {answer}")
        run, memory = answer
        return run, memory

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(CLOSE_S)
        self._process.kill()  # nothing happens to one that has ended
        self._process.join()


def _serve(connection: Connection, load: Callable[[], Decode]) -> None:
    try:
        decode = load()
        while True:
            jobs = connection.recv()
            connection.send((decode(jobs), Memory.own()))
    except EOFError:
        pass
    except TRMError as error:
        connection.send(str(error))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise
