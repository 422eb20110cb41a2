"""A mixer and its naive twin, side by side."""

from __future__ import annotations

import naive
import numpy as np
import pytest

from freedraft.plugins import mixing
from freedraft.plugins.evidence import CONTEXTS_A_TEXT, KINDS, REACH, SEPARATOR
from freedraft.plugins.own_text import ESCAPE


def twin(reach=REACH):
    return naive.Mixing(separator=SEPARATOR, escape=ESCAPE, contexts=CONTEXTS_A_TEXT, reach=reach)


def key_of(index):
    """The naive key of a rate: kind, length bucket, seen bucket, share, latest."""
    shape = (KINDS, mixing.LENGTH_BUCKETS, mixing.SEEN_BUCKETS, mixing.SHARE_BUCKETS, 2)
    return tuple(int(part) for part in np.unravel_index(index, shape))


def assert_same_knowledge(mixer, reference):
    for index in np.flatnonzero(mixer.observed):
        assert mixer.observed[index] == reference.observed[key_of(index)]
        assert mixer.rates[index] == pytest.approx(reference.rates[key_of(index)], rel=1e-6)
    assert np.count_nonzero(mixer.observed) == len(reference.observed)
    for key, weight in reference.weights.items():
        place = mixing.BIAS if key[1] == -1 else key[1] * mixing.LENGTH_BUCKETS + key[2]
        assert mixer.weights[key[0], place] == pytest.approx(weight, rel=1e-5, abs=1e-6)
    assert np.count_nonzero(mixer.token_weights) <= len(reference.token_weights)
    for (which, token, *place), weight in reference.token_weights.items():
        index = place[0] * mixing.LENGTH_BUCKETS + place[1]
        assert mixer.token_weights[which, token, index] == pytest.approx(weight, rel=1e-5, abs=1e-6)
    for kept, told, nothing in ((mixer.maps, reference.maps, mixing.start().maps), (mixer.mapped, reference.mapped, 0)):
        changed = {(int(which), int(token)) for which, token in zip(*np.nonzero((kept != nothing).any(2)), strict=True)}
        assert changed <= set(told)
        for key, line in told.items():
            assert kept[key] == pytest.approx(np.array(line), rel=1e-5, abs=1e-6)
    assert mixer.correction == pytest.approx(np.array(reference.correction), rel=1e-5)
    assert mixer.corrected == pytest.approx(np.array(reference.corrected), rel=1e-5)
