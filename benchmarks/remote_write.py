"""Writes many samples to Prometheus by its remote-write protocol."""

import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping

import numpy as np

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# Remote write: a protobuf message of labels and samples, in Snappy's framing. An hour of a thousand runs has a hundred
# million samples, for which Protobuf's own objects would take minutes. Every sample has 18 bytes, so numpy writes them
# all at once. The data is not compressed, which Snappy's format allows.
_SAMPLE = np.dtype(
    [
        ("header", "u1", 3),  # field 2 of 16 bytes; in it field 1, a double
        ("value", "<f8"),
        ("time_key", "u1"),  # field 2, a varint
        ("time", "u1", 6),
    ]
)
STALE = np.array([0x7FF0000000000002], np.uint64).view(np.float64)[0]
"""The NaN that marks the end of a series in Prometheus."""


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def _field(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def encode_samples(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Samples in protobuf's encoding.

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


def encode_series(labels: Mapping[str, str], samples: np.ndarray) -> bytes:
    pairs = (_field(1, name.encode()) + _field(2, value.encode()) for name, value in sorted(labels.items()))
    return _field(1, b"".join(_field(1, pair) for pair in pairs) + samples.tobytes())


def write(url: str, series: Iterable[bytes]) -> None:
    """Send encoded series to Prometheus.

    Raises:
        RuntimeError: Prometheus refused them; the message is Prometheus' own.
    """
    message = b"".join(series)
    body = _varint(len(message)) + b"\xfc" + (len(message) - 1).to_bytes(4, "little") + message
    headers = {"Content-Encoding": "snappy", "Content-Type": "application/x-protobuf"}
    try:
        _opener.open(urllib.request.Request(f"{url}/api/v1/write", body, headers), timeout=120).close()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"remote write: {error.code} {error.read().decode().strip()}") from error
