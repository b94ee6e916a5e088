"""Many synthetic runs from one recorded run: what their endpoints answer now, and what they would have answered before.

`python -m benchmarks.replay` is the process that serves them; `benchmarks.fleet` starts it.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from exporter.metrics import LAST_UPDATE_TIMESTAMP, RUN_LABEL

RECORDED = "recorded"
PROCESS_START = "process_start_time_seconds"
# What Prometheus 2.42 asks for; the recording is in the format that it would get.
ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
# Small rollouts: an update takes less than the time between two samples, so that each sample is another one.
TRAINER = (
    "--num-envs 8 --rollout-steps 16 --minibatch-size 64 --epochs 1 --total-timesteps 1000000000 "
    "--no-anneal-learning-rate"
)

_RUN, _TIME = b"\x00", b"\x01"  # stand for the run's name and its last update's time
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RecordingFailed(RuntimeError):
    """The trainer to be recorded ended, or did not begin."""


def record(samples: int, seconds_between: float, port: int, progress: Callable[[int], None]) -> "Recording":
    """Train, with a drill in the middle for a twentieth of the time, and keep what `/metrics` answers.

    Args:
        samples: how many answers to keep.
        seconds_between: time from one to the next.
        port: free port of 127.0.0.1 for the trainer.
        progress: called with the number of answers so far.

    Raises:
        RecordingFailed: with the end of the trainer's log.
    """
    length = samples * seconds_between
    drill = f"dominate:op:{length * 0.5:.1f}s-{length * 0.55:.1f}s"
    command = [sys.executable, "-m", "trainer", "--run", RECORDED, "--metrics-port", str(port), "--drill", drill]
    with tempfile.TemporaryDirectory(prefix="ppo-recording-") as folder, open(Path(folder, "log"), "w+") as log:
        command += ["--targets-dir", folder, "--checkpoint-every", "0", *TRAINER.split()]
        trainer = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)
        try:
            kept: list[tuple[float, str]] = []
            deadline = time.monotonic() + 60
            while len(kept) < samples:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": ACCEPT})
                try:
                    with _opener.open(request, timeout=5) as answer:
                        text, content_type = answer.read().decode(), answer.headers["Content-Type"]
                except OSError:
                    text = ""
                if LAST_UPDATE_TIMESTAMP.name + "{" in text:
                    kept.append((time.time(), text))
                    progress(len(kept))
                elif trainer.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RecordingFailed(f"the trainer to be recorded did not train:\n{log.read()[-2000:]}")
                time.sleep(seconds_between)
            return Recording(content_type, [moment for moment, _ in kept], [text for _, text in kept])
        finally:
            trainer.kill()
            trainer.wait()


@dataclass(frozen=True)
class Recording:
    """Answers of one run's `/metrics`, to be played in a loop in which counters go on rising.

    Attributes:
        content_type: of the answers.
        moments: Unix times at which they were given.
        answers: the texts.
    """

    content_type: str
    moments: list[float]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.answers)

    @cached_property
    def series(self) -> dict[str, int]:
        """The position of each series, as `/metrics` writes it, among all that are ever there."""
        return {name: i for i, name in enumerate(dict.fromkeys(n for a in self.answers for n, _, _ in _samples(a)))}

    @cached_property
    def values(self) -> np.ndarray:
        """[answers, series] float64; times are kept as the age that they had. NaN: the series was not there."""
        values = np.full((len(self), len(self.series)), np.nan)
        for row, (moment, answer) in enumerate(zip(self.moments, self.answers, strict=True)):
            for name, value, _ in _samples(answer):
                values[row, self.series[name]] = (
                    moment - value if name.startswith(LAST_UPDATE_TIMESTAMP.name) else value
                )
        return values

    @cached_property
    def growth(self) -> np.ndarray:
        """[series] float64, by how much a counter rises from one round of the loop to the next; 0 for all else."""
        growth = np.zeros(len(self.series))
        for name, _, is_counter in _samples(self.answers[-1]):
            column = self.values[:, self.series[name]]
            growth[self.series[name]] = column[-1] - np.nan_to_num(column[0]) if is_counter else 0.0
        return growth

    def template(self, position: int) -> bytes:
        """The answer at a position of the endless loop, with marks for the run and the last update's time."""
        rounds, row = divmod(position, len(self))
        lines = []
        for line in self.answers[row].splitlines():
            if not line.startswith("#"):
                name, text = line.rsplit(" ", 1)
                column = self.series[name]
                if name.startswith(LAST_UPDATE_TIMESTAMP.name):
                    text = _TIME.decode()
                elif self.growth[column]:
                    text = repr(float(self.values[row, column] + rounds * self.growth[column]))
                line = f"{name.replace(_LABEL, _MARKED_LABEL)} {text}"
            lines.append(line)
        return "\n".join((*lines, "")).encode()


_LABEL, _MARKED_LABEL = (f'{RUN_LABEL}="{name}"' for name in (RECORDED, _RUN.decode()))


def _samples(answer: str) -> Iterator[tuple[str, float, bool]]:
    """(series, value, whether it is a counter's) of each line."""
    kind = ""
    for line in answer.splitlines():
        if line.startswith("# TYPE "):
            kind = line.rsplit(" ", 1)[1]
        elif line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            yield name, float(value), kind in ("counter", "histogram")


def run_name(number: int) -> str:
    return f"run-{number:04d}"


@dataclass(frozen=True)
class Schedule:
    """Which answer each of the runs gives when.

    Attributes:
        runs: how many there are.
        length: of the recording, in answers.
        start: Unix time of the first answer.
        interval: seconds from one answer to the next, the scrape interval.
    """

    runs: int
    length: int
    start: float
    interval: float

    def position(self, run: int, tick: int) -> int:
        """Position in the loop `tick` scrapes after the start: runs are spread over the whole loop."""
        return tick + run * self.length // self.runs

    def moment(self, run: int, tick: int) -> float:
        """Unix time of a scrape: Prometheus spreads its targets over the interval too."""
        return self.start + (tick + run / self.runs) * self.interval

    def tick(self, moment: float) -> int:
        return int((moment - self.start) / self.interval)


# Remote write: a protobuf message of labels and samples, in the framing of Snappy. Protobuf's own objects would take
# minutes for the hundred million samples of an hour of a thousand runs; as every sample has the same 18 bytes, numpy
# writes them in one go. Left uncompressed, which Snappy's format allows.
_SAMPLE = np.dtype(
    [
        ("header", "u1", 3),  # field 2 of 16 bytes; in it field 1, a double
        ("value", "<f8"),
        ("time_key", "u1"),  # field 2, a varint
        ("time", "u1", 6),
    ]
)
STALE = np.array([0x7FF0000000000002], np.uint64).view(np.float64)[0]
"""The NaN by which Prometheus marks that a series has ended."""


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def _field(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def encode_labels(labels: Mapping[str, str]) -> bytes:
    pairs = (_field(1, name.encode()) + _field(2, value.encode()) for name, value in sorted(labels.items()))
    return b"".join(_field(1, pair) for pair in pairs)


def encode_samples(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Samples as protobuf has them.

    Args:
        times: [n] int64, milliseconds since 1970, 2**35 to 2**42.
        values: [..., n] float64.

    Returns:
        [..., n] of 18 bytes each.
    """
    samples = np.empty(values.shape, _SAMPLE)
    samples["header"], samples["value"], samples["time_key"] = (0x12, 16, 0x09), values, 0x10
    digits = times[:, None] >> np.arange(0, 42, 7) & 0x7F
    digits[:, :-1] |= 0x80
    samples["time"] = digits
    return samples


def encode_series(labels: bytes, samples: np.ndarray) -> bytes:
    return _field(1, labels + samples.tobytes())


def write(url: str, series: Iterable[bytes]) -> None:
    """Send encoded series to Prometheus.

    Raises:
        RuntimeError: it did not take them; the message is Prometheus' own.
    """
    message = b"".join(series)
    body = _varint(len(message)) + b"\xfc" + (len(message) - 1).to_bytes(4, "little") + message
    headers = {"Content-Encoding": "snappy", "Content-Type": "application/x-protobuf"}
    try:
        _opener.open(urllib.request.Request(f"{url}/api/v1/write", body, headers), timeout=120).close()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"remote write: {error.code} {error.read().decode().strip()}") from error


class History:
    """What Prometheus would have stored, had it scraped the runs: `up` included."""

    def __init__(self, recording: Recording, schedule: Schedule, job: str, instances: Sequence[str]) -> None:
        self._values, self._growth, self._schedule = recording.values, recording.growth, schedule
        self._is_age = np.array([name.startswith(LAST_UPDATE_TIMESTAMP.name) for name in recording.series])
        self._is_start = np.array([name.startswith(PROCESS_START) for name in recording.series])
        self._labels = []
        names = [
            dict(re.findall(r'(\w+)="([^"]*)"', name), __name__=name.partition("{")[0]) for name in recording.series
        ]
        for run, instance in enumerate(instances):
            own = {"job": job, "instance": instance, RUN_LABEL: run_name(run)}
            self._labels.append([encode_labels({**labels, **own}) for labels in (*names, {"__name__": "up"})])

    def of(self, run: int, ticks: range) -> list[bytes]:
        """Every series of a run, encoded, over these ticks."""
        schedule, every = self._schedule, len(self._values)
        positions = np.array([schedule.position(run, tick) for tick in ticks])
        moments = np.array([schedule.moment(run, tick) for tick in ticks])
        values = self._values[positions % every] + (positions // every)[:, None] * self._growth
        values[:, self._is_age] = moments[:, None] - values[:, self._is_age]
        values[:, self._is_start] = schedule.start - 3600
        is_there = ~np.isnan(values)
        was_there = ~np.isnan(self._values[(positions - 1) % every])
        values[~is_there & was_there] = STALE
        columns = np.column_stack((values, np.ones(len(positions)))).T
        is_written = np.column_stack((is_there | was_there, np.ones(len(positions), bool))).T
        samples = encode_samples((moments * 1000).astype(np.int64), np.ascontiguousarray(columns))
        return [
            encode_series(labels, of_series if all_there else of_series[written])
            for labels, of_series, written, all_there in zip(
                self._labels[run], samples, is_written, is_written.all(1), strict=True
            )
            if all_there or written.any()
        ]


class _Endpoint(asyncio.Protocol):
    """One connection: answers every request with the run's metrics."""

    def __init__(self, answer: Callable[[], bytes]) -> None:
        self._answer, self._request = answer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._request += data
        while b"\r\n\r\n" in self._request:
            self._request = self._request.partition(b"\r\n\r\n")[2]
            self._transport.write(self._answer())


async def serve(recording: Recording, schedule: Schedule, ports_file: Path) -> None:
    """Serve every run on a port of its own of 127.0.0.1, and write the list of ports to `ports_file`."""
    template = lru_cache(maxsize=2 * len(recording))(recording.template)
    start_time = re.compile(rf"^{PROCESS_START} .*$".encode(), re.MULTILINE)
    started = f"{PROCESS_START} {schedule.start - 3600}".encode()
    ages = recording.values[:, next(i for n, i in recording.series.items() if n.startswith(LAST_UPDATE_TIMESTAMP.name))]

    def answer(run: int) -> bytes:
        now = time.time()
        position = schedule.position(run, schedule.tick(now))
        body = template(position).replace(_RUN, run_name(run).encode())
        body = body.replace(_TIME, repr(float(now - ages[position % len(ages)])).encode())
        body = start_time.sub(started, body)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {recording.content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda run=run: _Endpoint(lambda: answer(run)), "127.0.0.1", 0)
        for run in range(schedule.runs)
    ]
    unfinished = ports_file.with_suffix(".tmp")
    unfinished.write_text(json.dumps([server.sockets[0].getsockname()[1] for server in servers]))
    unfinished.replace(ports_file)
    await asyncio.Event().wait()


def save(path: Path, recording: Recording, schedule: Schedule) -> None:
    path.write_text(json.dumps({"recording": asdict(recording), "schedule": asdict(schedule)}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("recording", type=Path, help="file of a recording and a schedule")
    parser.add_argument("ports", type=Path, help="file to be written: the port of each run")
    options = parser.parse_args()
    saved = json.loads(options.recording.read_text())
    asyncio.run(serve(Recording(**saved["recording"]), Schedule(**saved["schedule"]), options.ports))


if __name__ == "__main__":
    main()
