"""`python -m benchmarks.serving load|soak|faults`: see docs/serving-load.md."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.figure import table
from benchmarks.serving.charts import draw_load, draw_soak
from benchmarks.serving.faults import LEAVERS, ROUNDS, run_faults, scenarios
from benchmarks.serving.faults.check import checks_table
from benchmarks.serving.load import ALL_GROUPS, LoadSettings, aims, run_load
from benchmarks.serving.report import series_table, write_report
from benchmarks.serving.series import Series
from benchmarks.serving.server import ServerOptions
from benchmarks.serving.soak import SoakSettings, figures, run_soak

SOAK_CACHE = ("--cache-tokens", "4096")
"""Small enough to be full within the first minute: how full it is is no leak."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 1 when something that must hold does not."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def _load(options: argparse.Namespace) -> int:
    settings = LoadSettings(
        clients=options.clients,
        many=options.many,
        requests=options.requests,
        seconds=options.seconds,
        rate=options.rate,
        steady_seconds=options.steady_seconds,
        groups=tuple(options.only),
    )
    server = _server(options)
    log = options.output / "server.log"

    async def all_series() -> list[Series]:
        return [series async for series in run_load(settings, server, log)]

    series = asyncio.run(all_series())
    figures = aims(series, settings, server)
    record = {
        "server": server.to_json(),
        "settings": asdict(settings),
        "aims": [asdict(figure) for figure in figures],
        "series": [asdict(one) for one in series],
    }
    write_report(options.output, record, f"{table(figures)}\n\n{series_table(series)}")
    draw_load(series, options.output / "load.png")
    return 0


def _soak(options: argparse.Namespace) -> int:
    settings = SoakSettings(minutes=options.minutes, clients=options.clients, pause=options.pause)
    server = _server(options, SOAK_CACHE)
    soak = asyncio.run(run_soak(settings, server, options.output / "server.log"))
    measured = figures(soak, server)
    record = {"server": server.to_json(), "settings": asdict(settings), "soak": asdict(soak)}
    write_report(options.output, record, table(measured))
    draw_soak(soak.memory, soak.fitted_from, options.output / "soak.png")
    return 0 if all(figure.met for figure in measured) else 1


def _faults(options: argparse.Namespace) -> int:
    server = _server(options)
    known = scenarios(options.leavers, options.rounds)
    chosen = {name: known[name] for name in options.only}
    checks = asyncio.run(run_faults(server, options.output / "server.log", chosen))
    record = {"server": server.to_json(), "checks": [asdict(check) for check in checks]}
    write_report(options.output, record, checks_table(checks))
    return 0 if all(check.passed for check in checks) else 1


def _server(options: argparse.Namespace, extra: tuple[str, ...] = ()) -> ServerOptions:
    return ServerOptions(
        model=options.model,
        mode=options.mode,
        dtype=options.dtype,
        threads=options.threads,
        more=(*extra, *shlex.split(options.server_options)),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _load_options(_command(commands, "load", "throughput and latency by clients", _load))
    _soak_options(_command(commands, "soak", "memory over minutes", _soak))
    faults = _command(commands, "faults", "what dies, leaves or is too much", _faults)
    faults.set_defaults(mode="separate")
    names = list(scenarios())
    faults.add_argument("--only", nargs="+", choices=names, default=names)
    faults.add_argument("--leavers", type=int, default=LEAVERS, help="callers who leave")
    faults.add_argument(
        "--rounds", type=int, default=ROUNDS, help="kills, and stops, of each engine"
    )
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    about: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about)
    parser.set_defaults(run=run)
    parser.add_argument("--model", type=Path, help="a checkpoint's folder; default: the bundled")
    parser.add_argument("--mode", choices=["colocate", "separate"], default="colocate")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="of the server; default: its own choice")
    parser.add_argument(
        "--server-options", default="", metavar="TEXT", help="more options of neounify serve"
    )
    parser.add_argument("--output", type=Path, default=Path("out/serving") / name)
    return parser


def _load_options(parser: argparse.ArgumentParser) -> None:
    default = LoadSettings()
    parser.add_argument("--clients", type=_numbers, default=default.clients, metavar="N,N")
    parser.add_argument("--many", type=int, default=default.many, help="clients against one")
    parser.add_argument("--requests", type=int, default=default.requests, help="of a series")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="a series at most")
    parser.add_argument("--rate", type=float, default=default.rate, help="chats a second")
    parser.add_argument("--steady-seconds", type=float, default=default.steady_seconds)
    parser.add_argument("--only", nargs="+", choices=ALL_GROUPS, default=ALL_GROUPS)


def _soak_options(parser: argparse.ArgumentParser) -> None:
    default = SoakSettings()
    parser.add_argument("--minutes", type=float, default=default.minutes)
    parser.add_argument("--clients", type=int, default=default.clients)
    parser.add_argument("--pause", type=float, default=default.pause, help="seconds")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    # So that no server is left behind when the benchmark itself is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
