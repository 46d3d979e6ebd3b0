"""Hostile requests against a server process: its memory, its time and its liveness stay bounded.

Memory is the peak of the process (Linux keeps it), time is its processor time, so that other work
on the machine changes neither; only the delay of /health/live is wall time, and is measured again
before it counts. HOSTILE_REPORT=1 with -s prints what each request took.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from serve.http.hostile_bodies import Sent, large_requests, small_requests
from support.serving_command import served

MAX_GROWTH = 5 * 64 * 2**20
"""Bytes of a body at its limit, and of its text where one letter makes all take four bytes."""
MAX_CPU_SECONDS = 5.0
MAX_DELAY = 1.0
ATTEMPTS = 3
_TICKS = os.sysconf("SC_CLK_TCK")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="reads /proc as Linux has it"
    ),
]


class Server:
    """A server process and what it takes."""

    def __init__(self, pid: int, address: str) -> None:
        self._root, self.netloc = pid, urlsplit(address).netloc
        self.baseline = 0

    def pids(self) -> list[int]:
        """The process and those it started."""
        ids = [self._root]
        for pid in ids:
            for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
                ids += map(int, tasks.read_text().split())
        return ids

    def forget_peak(self) -> None:
        for pid in self.pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Resident bytes at most since `forget_peak`."""
        return sum(self._status(pid, "VmHWM") for pid in self.pids())

    def cpu_seconds(self) -> float:
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS

    def send(self, sent: Sent, timeout: float = 120) -> int:
        """The status, 0 where the server closed the connection first."""
        path, kind, body = sent
        link = http.client.HTTPConnection(self.netloc, timeout=timeout)
        try:
            link.request("POST", path, body, {"Content-Type": kind})
            answer = link.getresponse()
            text = answer.read(200_000)
        except (BrokenPipeError, ConnectionResetError):
            return 0
        finally:
            link.close()
        assert len(text) < 100_000, "an error repeats what was sent"
        return answer.status

    def health_delay(self, work: Callable[[], None]) -> float:
        """The longest answer of /health/live while `work` runs, in seconds."""
        thread = threading.Thread(target=work)
        longest = 0.0
        thread.start()
        while thread.is_alive():
            start = time.monotonic()
            link = http.client.HTTPConnection(self.netloc, timeout=60)
            link.request("GET", "/health/live")
            assert link.getresponse().status == 200
            link.close()
            longest = max(longest, time.monotonic() - start)
            thread.join(0.02)
        return longest

    @staticmethod
    def _status(pid: int, name: str) -> int:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        return 0


@dataclass(frozen=True)
class Cost:
    """What one request took: bytes over the baseline, seconds of processors, seconds of delay."""

    status: int
    growth: int
    cpu: float
    delay: float

    @property
    def within_limits(self) -> bool:
        return (
            self.growth <= MAX_GROWTH
            and self.cpu <= MAX_CPU_SECONDS
            and self.delay <= MAX_DELAY
            and self.status not in (500, 502, 503)
        )


def cost_of(server: Server, sent: Sent) -> Cost:
    statuses: list[int] = []
    server.forget_peak()
    before = server.cpu_seconds()
    delay = server.health_delay(lambda: statuses.append(server.send(sent)))
    cpu, growth = server.cpu_seconds() - before, server.peak() - server.baseline
    return Cost(statuses[0] if statuses else -1, growth, cpu, delay)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with its defaults, after a few requests of each kind."""
    with served("--quiet", "--dtype", "float32", "--threads", "1") as (process, address):
        server = Server(process.pid, address)
        warm = dict(small_requests_of("17 images", "2048 pixels a side", "100k letters"))
        for sent in warm.values():
            server.send(sent)
        chat = (
            "/v1/chat/completions",
            "application/json",
            b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}',
        )
        assert server.send(chat) == 200
        server.forget_peak()
        server.baseline = server.peak()
        yield server
        assert process.poll() is None


def small_requests_of(*names: str) -> Iterator[tuple[str, Sent]]:
    return ((name, sent) for name, sent in small_requests() if name in names)


@pytest.mark.parametrize(
    ("requests", "least", "most_bytes"),
    [(small_requests, 60, 10**6), (large_requests, 20, 75 * 10**6)],
    ids=["small", "large"],
)
def test_no_request_costs_more_than_it_may(
    server: Server,
    requests: Callable[[], Iterator[tuple[str, Sent]]],
    least: int,
    most_bytes: int,
) -> None:
    count = 0
    broken: dict[str, Cost] = {}
    for name, sent in requests():
        count += 1
        assert len(sent[2]) < most_bytes, name
        cost = cost_of(server, sent)
        for _ in range(ATTEMPTS - 1):  # the machine may have been busy
            if not cost.within_limits:
                cost = cost_of(server, sent)
        if not cost.within_limits:
            broken[name] = cost
        if "HOSTILE_REPORT" in os.environ:
            print(
                f"{name:36} {len(sent[2]):>9} B: {cost.status}, +{cost.growth // 2**20} MiB, "
                f"{cost.cpu:.2f} s of CPU, health after {cost.delay:.2f} s"
            )
    assert count >= least
    assert not broken
