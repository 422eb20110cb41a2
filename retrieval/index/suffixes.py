"""Suffix array and LCP array of a text of documents."""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.index.errors import MissingPackageError
from freedraft.retrieval.index.format import BORDER
from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32


def suffix_array(text: Int32) -> Int32:
    """The starts of the suffixes of `text` in lexicographic order, int32 `(n,)`; `BORDER` sorts first.

    By libdivsufsort (Mori; Fischer and Kurpicz 2017, "Dismantling DivSufSort"), which sorts the bytes of big-endian
    tokens: about 0.2 us and 20 bytes a token.

    Raises:
        MissingPackageError: pydivsufsort is not installed.
    """
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise MissingPackageError(
            "building an index needs pydivsufsort, which is not installed: pip install 'freedraft[index]'"
        ) from error
    if not len(text):
        return np.empty(0, np.int32)
    return np.asarray(divsufsort((text - BORDER).view(np.uint32)), np.int32)


@kernel
def lcp_array(text: Int32, suffixes: Int32) -> Int32:
    """How many tokens each suffix shares with the one before it in the suffix array, up to their document's border.

    By Kärkkäinen, Manzini and Puglisi (2009, "Permuted longest-common-prefix array"): in order of the text, where the
    number falls by at most 1 from one position to the next. Stopping at a border does not change that.
    """
    n = len(text)
    previous = np.empty(n, np.int32)
    if n > 0:
        previous[suffixes[0]] = -1
    for i in range(1, n):
        previous[suffixes[i]] = suffixes[i - 1]
    permuted = previous
    shared = 0
    for i in range(n):
        j = previous[i]
        if j < 0:
            shared = 0
        else:
            while i + shared < n and j + shared < n and text[i + shared] == text[j + shared] != BORDER:
                shared += 1
        permuted[i] = shared
        shared = max(shared - 1, 0)
    result = np.empty(n, np.int32)
    for i in range(n):
        result[i] = permuted[suffixes[i]]
    return result
