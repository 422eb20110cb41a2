"""The memory of all online automata: one arena, cut into pages that sequences own, and pages into blocks.

The arena is one int32 array; kernels see it as words, as states (8 words) or as edges (2 words). A sequence takes whole
pages from the arena and gives them all back when it closes, so pages are uniform and nothing can fragment. Inside its
pages a sequence allocates blocks of 16, 32 and 64 bytes: a free list a size, and a larger block cut in two when the
list is empty. Blocks never straddle a cache line.

An index that stands for "none" is 0: page 0 is never handed out.
"""

from __future__ import annotations

import numpy as np

from freedraft.retrieval.jit import kernel
from freedraft.retrieval.ragged import Int32

PAGE_WORDS = 4096
PAGE_BYTES = 4 * PAGE_WORDS
UNIT_WORDS = 4
LINE_UNITS = 4

# Block sizes are given as a rank: 0 = 16 bytes (1 unit), 1 = 32 (2 units), 2 = 64 (4 units, one cache line).
RANK_16, RANK_32, RANK_64 = 0, 1, 2

# Fields of `arena.pool`.
POOL_FRESH, POOL_FREE, POOL_TOTAL, POOL_USED, POOL_FREE_SLOT, POOL_MAX_LENGTH = range(6)
POOL_FIELDS = 6

# Fields of a sequence's header that belong to its memory; `automaton` adds its own after these.
HEAD_PAGES, HEAD_BUMP, HEAD_BUMP_END, HEAD_FREE = 0, 1, 2, 3
HEAD_MEMORY_FIELDS = 6


def new_pool(pages: int, max_length: int) -> Int32:
    """Return the `pool` of an arena of `pages` pages, all free; int32 `(POOL_FIELDS,)`.

    Args:
        pages: of the arena, page 0 included.
        max_length: tokens that one text may learn.
    """
    pool = np.zeros(POOL_FIELDS, np.int32)
    pool[POOL_FRESH] = 1
    pool[POOL_TOTAL] = pages
    pool[POOL_FREE_SLOT] = -1
    pool[POOL_MAX_LENGTH] = max_length
    return pool


@kernel
def take_page(pool: Int32, next_page: Int32, header: Int32) -> int:
    """Give the sequence of `header` one more page; return its index, or 0 when the arena is full."""
    page = pool[POOL_FREE]
    if page != 0:
        pool[POOL_FREE] = next_page[page]
    elif pool[POOL_FRESH] < pool[POOL_TOTAL]:
        page = pool[POOL_FRESH]
        pool[POOL_FRESH] = page + 1
    else:
        return 0
    pool[POOL_USED] += 1
    next_page[page] = header[HEAD_PAGES]
    header[HEAD_PAGES] = page
    return page


@kernel
def release_pages(pool: Int32, next_page: Int32, header: Int32) -> None:
    """Give all pages of a sequence back to the arena. O(pages)."""
    page = header[HEAD_PAGES]
    while page != 0:
        following = next_page[page]
        next_page[page] = pool[POOL_FREE]
        pool[POOL_FREE] = page
        pool[POOL_USED] -= 1
        page = following
    for field in range(HEAD_MEMORY_FIELDS):
        header[field] = 0


@kernel
def allocate(words: Int32, pool: Int32, next_page: Int32, header: Int32, rank: int) -> int:
    """Return the unit index of a block of `16 << rank` bytes, contents undefined, or 0 when the arena is full."""
    found = rank
    while found <= RANK_64 and header[HEAD_FREE + found] == 0:
        found += 1
    if found <= RANK_64:
        unit = header[HEAD_FREE + found]
        header[HEAD_FREE + found] = words[unit * UNIT_WORDS]
    else:
        if header[HEAD_BUMP] == header[HEAD_BUMP_END]:
            page = take_page(pool, next_page, header)
            if page == 0:
                return 0
            header[HEAD_BUMP] = page * (PAGE_WORDS // UNIT_WORDS)
            header[HEAD_BUMP_END] = (page + 1) * (PAGE_WORDS // UNIT_WORDS)
        unit = header[HEAD_BUMP]
        header[HEAD_BUMP] = unit + LINE_UNITS
        found = RANK_64
    while found > rank:
        found -= 1
        free(words, header, unit + (1 << found), found)
    return unit


@kernel
def free(words: Int32, header: Int32, unit: int, rank: int) -> None:
    """Put a block back on its sequence's free list."""
    words[unit * UNIT_WORDS] = header[HEAD_FREE + rank]
    header[HEAD_FREE + rank] = unit
