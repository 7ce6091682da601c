"""Random numbers as a pure function of a key and a counter.

Masks and crops are drawn from (seed, epoch, sample index), never from the state of a worker or a
rank, so a run is the same for any number of workers and ranks and resumes exactly. The generator
is the SplitMix64 finaliser applied to `key + (counter + 1) * golden`: one multiply-xorshift
chain per number, vectorised over the batch by numpy.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's bijective finaliser on uint64 values of any shape."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def derive_keys(*parts: int | np.ndarray) -> np.ndarray:
    """Fold integers into 64-bit keys: `derive_keys(seed, stream, epoch, indices)`.

    Each part is an int or an integer array; arrays broadcast. Returns uint64 of the broadcast
    shape. The order matters: (1, 2) and (2, 1) give unrelated keys.
    """
    with np.errstate(over="ignore"):
        key: np.ndarray = np.zeros((), dtype=np.uint64)
        for part in parts:
            if isinstance(part, int):
                part = part & 0xFFFFFFFFFFFFFFFF
            key = _mix(np.asarray(key + _GOLDEN) ^ _mix(np.asarray(part).astype(np.uint64)))
    return key


def random_bits(keys: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """(B,) uint64 keys -> (B, count) uint64 draws number `first` to `first + count - 1`."""
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return _mix(np.asarray(keys, dtype=np.uint64)[:, None] + counters * _GOLDEN)


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """(B,) uint64 keys -> (B, count) float64 draws in [0, 1)."""
    return (random_bits(keys, count) >> np.uint64(11)) * 2.0**-53
