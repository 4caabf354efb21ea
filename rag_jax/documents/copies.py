"""Passages that say the same as an earlier one: equal but for case and blanks, or nearly (MinHash; Broder, 1997)."""

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np

# Words that are compared together, hash functions, and how many of these must agree in one place to be looked at.
SHINGLE, HASHES, BAND = 5, 64, 4
# Share of equal signatures from which on passages are taken for copies: of their shingles about as many are common.
ALIKE = 0.8
# Bytes of a whole text's digest.
DIGEST = 16


def signature(text: str) -> np.ndarray:
    """(HASHES,) uint32: of sets of shingles that overlap by a share, that share of it is equal."""
    found = re.findall(r"\w+", text.lower())
    shingles = {" ".join(found[i : i + SHINGLE]) for i in range(max(len(found) - SHINGLE + 1, 1))}
    digests = [int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "little") for s in shingles]
    numbers = np.array(digests, np.uint64)[:, None]
    factors, terms = _functions()
    # Multiply-shift (Dietzfelbinger et al., 1997): modulo 2^64, of which the upper half is kept.
    return ((numbers * factors + terms) >> np.uint64(32)).min(axis=0).astype(np.uint32)


@functools.cache
def _functions() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    factors, terms = draw.integers(0, 2**64, (2, HASHES), np.uint64)
    return factors | np.uint64(1), terms


def firsts(signatures: np.ndarray, digests: bytes | bytearray) -> np.ndarray:
    """(n,) bool: passages that are no copy of an earlier one. `digests`: of the whole texts, one after the other."""
    keep = np.zeros(len(signatures), bool)
    keep[np.unique(np.frombuffer(digests, np.dtype([("", np.uint64)] * (DIGEST // 8))), return_index=True)[1]] = True
    for start in range(0, HASHES, BAND):
        band = np.ascontiguousarray(signatures[:, start : start + BAND]).view(f"V{4 * BAND}").ravel()
        order = np.argsort(band.view([("", np.uint32)] * BAND), kind="stable")
        same = np.flatnonzero(band[order][1:] == band[order][:-1])
        for run in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1) if len(same) else []:
            members = order[run[0] : run[-1] + 2]
            first = [members[0]]
            for other in members[1:]:
                if any((signatures[one] == signatures[other]).mean() >= ALIKE for one in first[:8]):
                    keep[other] = False
                else:
                    first.append(other)
    return keep


def like_any(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """(n,) bool: texts that say nearly what one of the others does."""
    found = np.zeros(len(texts), bool)
    if not len(texts) or not len(others):
        return found
    ours, theirs = (np.stack([signature(text) for text in each]) for each in (texts, others))
    for start in range(0, HASHES, BAND):
        places: dict[bytes, list[int]] = {}
        for i, band in enumerate(theirs[:, start : start + BAND]):
            places.setdefault(band.tobytes(), []).append(i)
        for i in np.flatnonzero(~found):
            near = places.get(ours[i, start : start + BAND].tobytes(), [])
            found[i] = bool(near) and (theirs[near] == ours[i]).mean(axis=1).max() >= ALIKE
    return found


def digest(text: str) -> bytes:
    """Of a text's words, in lower case."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=DIGEST).digest()
