"""The command `trm-bench`: runs a benchmark, prints its table, and ends with one line of JSON.

Heavy imports wait until the settings are known to be good.
"""

import argparse
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.bench.settings import ServeBenchSettings, SoakSettings
from trm.bench.settings import DecodeSettings, PeersSettings
from trm.errors import TRMError
from trm.settings import add_version, run_command

COMMAND = "trm-bench"
Raw = dict[str, Any]
AnySettings = DecodeSettings | PeersSettings | ServeBenchSettings | SoakSettings
BENCHMARKS: Mapping[str, type[AnySettings]] = {
    "decode": DecodeSettings,
    "peers": PeersSettings,
    "serve": ServeBenchSettings,
    "soak": SoakSettings,
}


def main() -> None:
    """Entry point of `trm-bench`. SIGTERM ends it as Ctrl-C does, and with it the server that it has started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(lambda: _bench(sys.argv[1:]), COMMAND)


def _bench(argv: Sequence[str]) -> None:
    benchmark, settings = read_command_line(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", level="INFO")
    measure, table = _functions(benchmark)

    import torch

    result = {
        "benchmark": benchmark,
        **measure(settings),
        "max_rows": settings.max_rows,
        "threads": settings.num_threads,
        "seed": settings.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    if isinstance(settings, SoakSettings) and settings.report is not None:
        from server.bench.soak import report

        report.write(settings.report, result)
    print(table(result))  # noqa: T201 - the table
    print(json.dumps(result))  # noqa: T201 - the command's result
    if failed := [row["check"] for row in result.get("checks", ()) if not row["holds"]]:
        raise TRMError(f"{len(failed)} checks do not hold: {'; '.join(failed)}")


def read_command_line(argv: Sequence[str]) -> tuple[str, AnySettings]:
    """Which benchmark, and its settings. Raises ConfigError in one line; `--help` and an unknown benchmark exit."""
    parser = argparse.ArgumentParser(
        COMMAND,
        description=f"Measure decoding or serving. `{COMMAND} BENCHMARK --help` lists the settings of one.",
    )
    add_version(parser)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, settings in BENCHMARKS.items():
        benchmarks.add_parser(name, help=settings.__doc__)
    benchmark = parser.parse_args(argv[:1]).benchmark
    return benchmark, BENCHMARKS[benchmark].from_command_line(argv[1:])


def _functions(benchmark: str) -> tuple[Callable[[Any], Raw], Callable[[Raw], str]]:
    """What measures, given the benchmark's settings, and what makes a table of the result."""
    if benchmark == "decode":
        from trm.bench import decode

        return decode.measure, decode.table
    if benchmark == "peers":
        from trm.bench import peers

        return peers.measure, peers.table
    if benchmark == "serve":
        from server.bench import serve

        return serve.measure, serve.table

    from server.bench.soak import report, run

    return run.measure, report.table
