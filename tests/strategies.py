"""Hypothesis strategies, shared by all tests."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

MAX_TOKEN = 2**31 - 1

alphabets = st.sampled_from([1, 2, 3, 5, 40, 5000, MAX_TOKEN])


@st.composite
def texts(draw: st.DrawFn, max_size: int = 120) -> list[int]:
    """Token sequences: random over small and huge alphabets, and copies with edits, as real text has them."""
    alphabet = draw(alphabets)
    text = draw(st.lists(st.integers(0, alphabet), max_size=max_size))
    for _ in range(draw(st.integers(0, 3))):
        if not text:
            break
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start, len(text)))
        text = text + text[start:end] + draw(st.lists(st.integers(0, alphabet), max_size=2))
    return text[: 2 * max_size]


@st.composite
def pieces(draw: st.DrawFn, text: list[int]) -> list[list[int]]:
    """A text cut into consecutive pieces, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


@st.composite
def corpora(draw: st.DrawFn, max_documents: int = 6, max_size: int = 30) -> list[list[int]]:
    """Documents that repeat one another in part, some of them empty."""
    alphabet = draw(alphabets)
    documents: list[list[int]] = []
    for _ in range(draw(st.integers(0, max_documents))):
        document = draw(st.lists(st.integers(0, alphabet), max_size=max_size))
        if documents and draw(st.booleans()):
            source = draw(st.sampled_from(documents))
            start = draw(st.integers(0, len(source)))
            document = document[: max_size // 2] + source[start : draw(st.integers(start, len(source)))]
        documents.append(document)
    return documents


@st.composite
def queries(draw: st.DrawFn, documents: list[list[int]], max_size: int = 30) -> list[int]:
    """A text made of pieces of documents and of foreign tokens."""
    text: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        if documents and draw(st.integers(0, 3)):
            source = draw(st.sampled_from(documents))
            start = draw(st.integers(0, len(source)))
            text += source[start : draw(st.integers(start, len(source)))]
        else:
            text += draw(st.lists(st.integers(0, 5), max_size=2))
    return text[:max_size]
