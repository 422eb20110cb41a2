"""Segments that are not what a writer wrote: each case by its own error, and never a crash or a loop without end."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from freedraft.plugins.corpus import Chains, continue_batch
from freedraft.retrieval.index import validate
from freedraft.retrieval.index.documents import Documents
from freedraft.retrieval.index.errors import (
    ByteOrderError,
    ChecksumError,
    CorpusIndexError,
    DamagedError,
    MagicError,
    NotFoundError,
    OversizedError,
    SectionError,
    TruncatedError,
    VersionError,
)
from freedraft.retrieval.index.follow import DAMAGED, FINE
from freedraft.retrieval.index.format import (
    COUNT,
    DEGREE,
    EDGE_LABEL,
    EDGE_TARGET,
    EDGE_TIMES,
    EDGE_TOKEN,
    EDGES,
    END,
    LABEL,
    LENGTH,
    LINK,
    TARGET,
    TIMES,
    TOKEN,
    Section,
)
from freedraft.retrieval.index.segment import Segment, segment_bytes
from freedraft.retrieval.query import documents_with, likeliest_draft
from freedraft.retrieval.ragged import ragged

ROWS = [[1, 2, 3, 1, 2, 4], [2, 3, 1, 2, 3], [5, 1, 2, 4], [2]]
# The spec's numbers, spelled out here rather than taken from the code that is tested.
HEADER = 360
TABLE = 64
ENTRY = 40
I32_MIN, I32_MAX = -(2**31), 2**31 - 1
I64_MAX = 2**63 - 1


def documents_of(rows):
    return Documents.of((f"d{i}", np.array(row, np.int32)) for i, row in enumerate(rows))


def sound(rows=ROWS):
    return bytearray(b"".join(piece.tobytes() for piece in segment_bytes(documents_of(rows))))


def blake(content):
    return hashlib.blake2b(bytes(content), digest_size=16).digest()


def entry_at(content, kind):
    """Where the table's entry of a section is."""
    for at in range(TABLE, TABLE + 7 * ENTRY, ENTRY):
        if struct.unpack_from("<I", content, at)[0] == kind:
            return at
    raise KeyError(kind)


def place_of(content, kind):
    return struct.unpack_from("<QQ", content, entry_at(content, kind) + 8)


def repair_header(content):
    content[HEADER - 16 : HEADER] = blake(content[: HEADER - 16])
    return content


def repair_all(content):
    for kind in Section:
        offset, size = place_of(content, kind)
        struct.pack_into("16s", content, entry_at(content, kind) + 24, blake(content[offset : offset + size]))
    return repair_header(content)


def with_number(layout, at, value):
    """Sound but for one number in the header, whose digest is right."""
    content = sound()
    struct.pack_into(layout, content, at, value)
    return repair_header(content)


def with_entry(section, **fields):
    """Sound but for fields of a section's entry in the table."""
    content = sound()
    at = entry_at(content, section)
    for name, value in fields.items():
        layout, offset = {"kind": ("<I", 0), "offset": ("<Q", 8), "size": ("<Q", 16)}[name]
        struct.pack_into(layout, content, at + offset, value)
    return repair_header(content)


def with_array(kind, change):
    """Sound but for what `change` does to a section's array; all digests are right."""
    content = sound()
    offset, size = place_of(content, kind)
    dtype = "<i8" if kind in (Section.STARTS, Section.NAME_OFFSETS) else "<i4"
    columns = {Section.NODES: 10, Section.EDGES: 4}.get(kind)
    array = np.frombuffer(content[offset : offset + size], dtype).copy()
    array = array.reshape(-1, columns) if columns else array
    change(array)
    content[offset : offset + size] = array.tobytes()
    return repair_all(content)


def write(folder, content):
    path = folder / "a.segment"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


def refuse(folder, content, error, words=None):
    with pytest.raises(CorpusIndexError, match=words) as caught:
        Segment(write(folder, content))
    assert type(caught.value) is error
    assert "a.segment" in str(caught.value)


def test_a_sound_segment_is_sound_however_few_nodes_are_checked_at_once(tmp_path, monkeypatch):
    segment = Segment(write(tmp_path, sound()))
    for number in range(1, len(segment.automaton.nodes) + 2):
        monkeypatch.setattr(validate, "NODES_AT_ONCE", number)
        segment.verify()


def test_the_helpers_leave_a_sound_segment_sound(tmp_path):
    assert repair_all(sound()) == sound()
    Segment(write(tmp_path, with_array(Section.NODES, lambda nodes: None))).verify()


class TestGolden:
    """A change of these bytes is a change of the format: it needs a new version."""

    def test_bytes(self):
        assert len(sound()) == 1152
        assert blake(sound()).hex() == "1b4b8b7c5029b7b8b9090f53c29fbf13"

    def test_header(self):
        content = sound()
        assert content[0:8] == b"FDSEGMNT"
        assert struct.unpack_from("<II", content, 8) == (1, 0x01020304)
        assert content[12:16] == bytes([4, 3, 2, 1])
        size, text, documents, nodes, edges = struct.unpack_from("<5Q", content, 16)
        assert (size, text, documents) == (len(content), sum(map(len, ROWS)) + len(ROWS), len(ROWS))
        assert struct.unpack_from("<II", content, 56) == (1, 7)
        sizes = {}
        end = HEADER
        for i in range(7):
            kind, zero, offset, length, checksum = struct.unpack_from("<IIQQ16s", content, 64 + 40 * i)
            assert (kind, zero, offset % 64) == (i + 1, 0, 0)
            assert end <= offset < end + 64
            assert not any(content[end:offset])
            assert checksum == blake(content[offset : offset + length])
            end = offset + length
            sizes[kind] = length
        assert end == size
        names = len("d0d1d2d3")
        assert list(sizes.values()) == [4 * text, 40 * nodes, 16 * edges, 40, 40, names, 16 * documents]
        assert content[344:360] == blake(content[:344])

    def test_sections(self):
        content = sound()
        parts = {kind: bytes(content[o : o + n]) for kind in range(1, 8) for o, n in [place_of(content, kind)]}
        assert np.frombuffer(parts[1], "<i4").tolist() == [t for row in ROWS for t in [*row, -1]]
        assert np.frombuffer(parts[4], "<i8").tolist() == [0, 7, 13, 18, 20]
        assert np.frombuffer(parts[5], "<i8").tolist() == [0, 2, 4, 6, 8]
        assert parts[6] == b"d0d1d2d3"
        assert parts[7] == b"".join(blake(np.array(row, "<i4").tobytes()) for row in ROWS)
        root = np.frombuffer(parts[2], "<i4")[:10].tolist()
        # 2 is the likeliest token, 6 times; a token starts at 16 places, with 4 others besides 2.
        assert (root[LENGTH], root[COUNT]) == (0, 16)
        assert (root[EDGES], root[DEGREE], root[TOKEN], root[TIMES]) == (0, 4, 2, 6)


class TestRefusedOnOpening:
    @pytest.mark.parametrize("length", [0, 1, 7, 8, 64, 359, 360, 361, 700, -1])
    def test_truncated(self, tmp_path, length):
        refuse(tmp_path, sound()[:length], TruncatedError)

    @pytest.mark.parametrize("more", [1, 64, 5000])
    def test_oversized(self, tmp_path, more):
        refuse(tmp_path, sound() + bytes(more), OversizedError)

    @pytest.mark.parametrize("start", [bytes(8), b"FDSEGMNU", b'{"format'])
    def test_magic(self, tmp_path, start):
        refuse(tmp_path, start + sound()[8:], MagicError, "not a freedraft segment")

    @pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
    @pytest.mark.parametrize("repair", [repair_header, bytes])
    def test_version(self, tmp_path, version, repair):
        content = sound()
        struct.pack_into("<I", content, 8, version)
        refuse(tmp_path, repair(content), VersionError, str(version))

    def test_byte_order(self, tmp_path):
        content = sound()
        content[12:16] = content[12:16][::-1]
        refuse(tmp_path, content, ByteOrderError, "0x04030201")

    def test_a_machine_that_is_not_little_endian(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "byteorder", "big")
        refuse(tmp_path, sound(), ByteOrderError, "this machine")

    @pytest.mark.parametrize("at", [16, 24, 56, 64, 88, 343, 344, 359])
    def test_header_checksum(self, tmp_path, at):
        content = sound()
        content[at] ^= 1
        refuse(tmp_path, content, ChecksumError, "header")

    def test_not_there(self, tmp_path):
        with pytest.raises(NotFoundError):
            Segment(tmp_path / "a.segment")

    @pytest.mark.parametrize("count", [0, 6, 8, 2**32 - 1])
    def test_number_of_sections(self, tmp_path, count):
        refuse(tmp_path, with_number("<I", 60, count), SectionError, "sections")

    @pytest.mark.parametrize(("at", "what"), [(24, "text"), (40, "nodes"), (48, "edges")])
    @pytest.mark.parametrize("number", [2**31, 2**32, 2**64 - 1])
    def test_numbers_that_int32_cannot_hold(self, tmp_path, at, what, number):
        refuse(tmp_path, with_number("<Q", at, number), SectionError, what)

    def test_no_root(self, tmp_path):
        refuse(tmp_path, with_number("<Q", 40, 0), SectionError, "root")

    @pytest.mark.parametrize("number", [25, 2**31, 2**64 - 1])
    def test_more_documents_than_text(self, tmp_path, number):
        refuse(tmp_path, with_number("<Q", 32, number), SectionError, "documents")

    @pytest.mark.parametrize(("at", "by"), [(24, 1), (24, -1), (32, -1), (32, 1), (40, 1), (40, -1), (48, 1), (48, -1)])
    def test_numbers_that_do_not_fit_the_sections(self, tmp_path, at, by):
        number = struct.unpack_from("<Q", sound(), at)[0]
        refuse(tmp_path, with_number("<Q", at, number + by), SectionError, "expected shape")

    @pytest.mark.parametrize("kind", [0, 8, 2**32 - 1])
    def test_unknown_section(self, tmp_path, kind):
        refuse(tmp_path, with_entry(Section.EDGES, kind=kind), SectionError, "unknown")

    @pytest.mark.parametrize("kind", [kind for kind in Section if kind != Section.EDGES])
    def test_doubled_section_so_that_one_is_missing(self, tmp_path, kind):
        refuse(tmp_path, with_entry(Section.EDGES, kind=int(kind)), SectionError, f"{kind.name} is there twice")

    @pytest.mark.parametrize("kind", list(Section))
    @pytest.mark.parametrize("by", [1, 4, 8, 32, -4])
    def test_misaligned_section(self, tmp_path, kind, by):
        offset, _ = place_of(sound(), kind)
        refuse(tmp_path, with_entry(kind, offset=offset + by), SectionError, "not aligned")

    @pytest.mark.parametrize("kind", list(Section))
    def test_section_over_the_header(self, tmp_path, kind):
        refuse(tmp_path, with_entry(kind, offset=320), SectionError, "overlaps")

    @pytest.mark.parametrize("kind", [kind for kind in Section if kind != Section.TEXT])
    def test_section_over_another(self, tmp_path, kind):
        offset, _ = place_of(sound(), Section.TEXT)
        refuse(tmp_path, with_entry(kind, offset=offset), SectionError, "overlaps")

    @pytest.mark.parametrize("kind", list(Section))
    @pytest.mark.parametrize("offset", [4096, 2**40, 2**63, 2**64 - 64])
    def test_section_out_of_the_file(self, tmp_path, kind, offset):
        refuse(tmp_path, with_entry(kind, offset=offset), SectionError, "ends at")

    @pytest.mark.parametrize("kind", list(Section))
    @pytest.mark.parametrize("size", [2**20, 2**64 - 1])
    def test_section_that_leads_out_of_the_file(self, tmp_path, kind, size):
        refuse(tmp_path, with_entry(kind, size=size), SectionError)

    @pytest.mark.parametrize("kind", [kind for kind in Section if kind != Section.NAMES])
    @pytest.mark.parametrize("by", [-1, 1, -4])
    def test_section_of_the_wrong_size(self, tmp_path, kind, by):
        _, size = place_of(sound(), kind)
        refuse(tmp_path, with_entry(kind, size=size + by), SectionError)

    # The last two rise if the differences are taken in int64, which wraps.
    @pytest.mark.parametrize(
        "values",
        [
            [1, 7, 13, 18, 20], [0, 7, 13, 18, 19], [0, 7, 13, 18, 21], [0, 13, 7, 18, 20], [0, 7, 7, 18, 20],
            [0, -1, 13, 18, 20], [0, 21, 22, 23, 20], [0, 5, I64_MAX, -2, 20], [0, I64_MAX, -3, -2, 20],
        ],
    )  # fmt: skip
    def test_documents_starts(self, tmp_path, values):
        def change(array):
            array[:] = values

        refuse(tmp_path, with_array(Section.STARTS, change), DamagedError, "starts")

    @pytest.mark.parametrize(
        "values",
        [[1, 2, 4, 6, 8], [0, 2, 4, 6, 7], [0, 4, 2, 6, 8], [0, 9, 9, 9, 8], [0, 2, I64_MAX, -2, 8]],
    )
    def test_documents_names(self, tmp_path, values):
        def change(array):
            array[:] = values

        refuse(tmp_path, with_array(Section.NAME_OFFSETS, change), DamagedError, "names")

    def test_documents_may_have_no_name(self, tmp_path):
        def change(array):
            array[:] = [0, 0, 4, 8, 8]

        segment = Segment(write(tmp_path, with_array(Section.NAME_OFFSETS, change)))
        assert segment.names() == ["", "d0d1", "d2d3", ""]


def use(segment, source, steps=6):
    """Everything that follows a segment; returns how often it was found damaged, which alone may be raised."""
    found = 0
    cursors = segment.new_cursors(3)
    slots = np.array([2, 0, 1])
    text = segment.automaton.text
    for _ in range(steps):
        rows = []
        for _ in slots:
            # What the file itself says, so that walks go deep; now and then another token.
            start = source.randrange(len(text) + 1)
            row = [int(token) for token in text[start : start + source.randrange(12)] if token >= 0]
            rows.append(row + [source.randrange(7)] * source.randrange(2))
        try:
            segment.advance(cursors, slots, *ragged(rows))
        except DamagedError:
            found += 1
        try:
            contexts = segment.contexts(cursors, slots, source.choice([1, 8, 40]))
            assert contexts.length.shape == contexts.times.shape
        except DamagedError:
            found += 1
        chains = Chains.none(3, 12)
        status = continue_batch(
            segment.automaton, cursors, slots, np.array([12, 5, 0], np.int32), 1, 0.0,
            chains.tokens, chains.probability, chains.lengths,
        )  # fmt: skip
        assert status in (FINE, DAMAGED)
        found += status == DAMAGED
        assert (chains.tokens >= 0).all()
        assert (chains.lengths <= [12, 5, 0]).all()
    return found


def answered(segment, source):
    """Ask as `freedraft index query` does; whether nothing damaged was met."""
    text = np.array([source.randrange(6) for _ in range(4)], np.int32)
    documents_with([segment], text[-1:])
    try:
        drafted = likeliest_draft([segment], text, 4)
    except DamagedError:
        return False
    assert all(0 < one.probability <= 1 and one.token >= 0 for one in drafted)
    return True


def set_node(node, field, value):
    def change(nodes):
        nodes[node, field] = value

    return Section.NODES, change


def set_edge(edge, field, value):
    def change(edges):
        edges[edge, field] = value

    return Section.EDGES, change


def set_token(at, value):
    def change(text):
        text[at] = value

    return Section.TEXT, change


EXTREMES = [I32_MIN, I32_MAX, 10_000]
DAMAGES = {
    "a border is a token": (*set_token(6, 3), "border"),
    "a border too many": (*set_token(8, -1), "negative"),
    "a token is negative": (*set_token(8, I32_MIN), "negative"),
    "the root is not empty": (*set_node(0, LENGTH, 1), "root"),
    "a link to itself": (*set_node(1, LINK, 1), "link"),
    "a link to a longer string": (*set_node(1, LINK, -1), "link"),
    **{f"a link to {v}": (*set_node(-1, LINK, v), "link") for v in EXTREMES},
    **{f"a length of {v}": (*set_node(1, LENGTH, v), None) for v in [*EXTREMES, 0]},
    **{f"an end at {v}": (*set_node(1, END, v), None) for v in [*EXTREMES, 0]},
    **{f"edges at {v}": (*set_node(0, EDGES, v), "edges") for v in [*EXTREMES, -1, 1]},
    **{f"{v} edges": (*set_node(0, DEGREE, v), "edges") for v in [*EXTREMES, -1]},
    **{f"a count of {v}": (*set_node(0, COUNT, v), "occurrences") for v in [I32_MIN, 0, 5, 1000]},
    "another's link": (*set_node(4, LINK, 2), "suffix that it links to"),
    "another's digest": (Section.DIGESTS, lambda digests: digests.put(0, ~digests[0]), "digest of document 0"),
    **{f"a likeliest token {v}": (*set_node(0, TOKEN, v), None) for v in [I32_MIN, I32_MAX, -1, 3]},
    **{f"a likeliest target {v}": (*set_node(0, TARGET, v), "edge") for v in EXTREMES},
    **{f"a likeliest label of {v}": (*set_node(0, LABEL, v), "edge") for v in [*EXTREMES, 0, -1]},
    **{f"likeliest {v} times": (*set_node(0, TIMES, v), None) for v in [I32_MIN, I32_MAX, 0, -1]},
    **{f"an edge's token {v}": (*set_edge(0, EDGE_TOKEN, v), None) for v in [I32_MIN, I32_MAX, -1, 2]},
    **{f"an edge's target {v}": (*set_edge(0, EDGE_TARGET, v), "edge") for v in EXTREMES},
    **{f"an edge's label of {v}": (*set_edge(0, EDGE_LABEL, v), "edge") for v in [*EXTREMES, 0, -1]},
    **{f"an edge's {v} times": (*set_edge(0, EDGE_TIMES, v), "edge") for v in [I32_MIN, I32_MAX, 0, -1]},
}


class TestFoundOnVerify:
    @pytest.mark.parametrize("nodes_at_once", [2, validate.NODES_AT_ONCE])
    @pytest.mark.parametrize(("kind", "change", "words"), DAMAGES.values(), ids=DAMAGES.keys())
    def test_structure(self, tmp_path, monkeypatch, kind, change, words, nodes_at_once):
        monkeypatch.setattr(validate, "NODES_AT_ONCE", nodes_at_once)
        segment = Segment(write(tmp_path, with_array(kind, change)))
        with pytest.raises(DamagedError, match=words):
            segment.verify()
        source = random.Random(1)
        for _ in range(10):
            use(segment, source)

    @pytest.mark.parametrize("kind", list(Section))
    def test_section_checksum(self, tmp_path, kind):
        content = sound()
        offset, size = place_of(content, kind)
        at = {Section.STARTS: 8, Section.NAME_OFFSETS: 8}.get(kind, size - 1)
        content[offset + at] ^= 1
        segment = Segment(write(tmp_path, content))
        with pytest.raises(ChecksumError, match=kind.name):
            segment.verify()

    @pytest.mark.parametrize("kind", list(Section))
    def test_checksum_in_the_table(self, tmp_path, kind):
        content = sound()
        content[entry_at(content, kind) + 24] ^= 1
        segment = Segment(write(tmp_path, repair_header(content)))
        with pytest.raises(ChecksumError, match=kind.name):
            segment.verify()

    def test_documents_whose_text_is_not_what_the_table_says(self, tmp_path):
        segment = Segment(write(tmp_path, with_array(*set_token(8, -1))))
        with pytest.raises(DamagedError):
            segment.documents()

    def test_damage_met_on_the_way_is_told(self, tmp_path):
        segment = Segment(write(tmp_path, with_array(*set_node(0, LABEL, I32_MAX))))
        cursors = segment.new_cursors(1)
        with pytest.raises(DamagedError, match="verify"):
            segment.advance(cursors, np.zeros(1, np.int64), *ragged([[2]]))
        assert (cursors[0, :2] == 0).all()


def flip_bits(content, source):
    for _ in range(source.choice([1, 1, 2, 8])):
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)


def set_words(content, source):
    """Numbers that are likely to be believed, or that overflow, in the automaton or the documents' tables."""
    for _ in range(source.choice([1, 1, 2, 8])):
        kind = source.choice([Section.TEXT, Section.NODES, Section.NODES, Section.EDGES, Section.STARTS])
        offset, size = place_of(content, kind)
        if size == 0:
            continue
        value = source.choice([0, 1, -1, 2, -2, I32_MIN, I32_MAX, *(source.randrange(-40, 40) for _ in range(5))])
        struct.pack_into("<i", content, offset + 4 * source.randrange(size // 4), value)


def corpora(source):
    """Rows of all kinds, so that the automaton has links, inner edges and edges to no node."""
    period = source.randrange(1, 6)
    return [
        [i % period for i in range(source.randrange(40))] if source.random() < 0.3
        else [source.randrange(6) for _ in range(source.randrange(30))]
        for _ in range(source.randrange(1, 6))
    ]  # fmt: skip


def fuzz(folder, cases, seed):
    """Damage segments, then do with them all that one can; only errors of an index may come out. How often what."""
    source = random.Random(seed)
    seen = Counter()
    for case in range(cases):
        if case % 50 == 0:
            whole = sound(corpora(source))
        content = whole.copy()
        repair = (bytes, repair_header, repair_all)[case % 3]
        if repair is bytes or source.random() < 0.3:
            flip_bits(content, source)
        else:
            set_words(content, source)
        try:
            content = repair(content)
        except KeyError:
            # The table itself was hit: nothing tells where the sections are.
            content = repair_header(content)
        path = folder / f"{case}.segment"
        path.write_bytes(content)
        try:
            segment = Segment(path)
        except CorpusIndexError as error:
            seen[type(error).__name__] += 1
            path.unlink()
            continue
        path.unlink()
        seen["opened"] += 1
        try:
            segment.verify()
            seen["verified"] += 1
        except CorpusIndexError as error:
            seen[f"verify {type(error).__name__}"] += 1
        try:
            segment.documents()
        except CorpusIndexError:
            seen["documents"] += 1
        assert len(segment.names()) == len(segment)
        seen["damaged on the way"] += use(segment, source) > 0
        seen["damaged query"] += not answered(segment, source)
    return seen


def assert_thorough(seen, cases):
    """The cases went where they should: a fuzzer whose cases are all refused at once tests nothing."""
    assert seen["opened"] > cases / 3
    assert seen["ChecksumError"] > cases / 20
    assert seen["verify ChecksumError"] > cases / 20
    assert seen["verify DamagedError"] > cases / 20
    assert seen["damaged on the way"] > cases / 20
    assert seen["damaged query"] > cases / 20


def test_fuzz(tmp_path):
    assert_thorough(fuzz(tmp_path, 1500, seed=0), 1500)


@pytest.mark.slow
def test_fuzz_with_every_index_checked(tmp_path):
    """In a process of its own, where compiled code checks bounds: what reads beside an array raises, not only crashes.

    Slow: it compiles all kernels anew, and runs forty times as many cases.
    """
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import test_index_malformed as tests\n"
        "tests.assert_thorough(tests.fuzz(pathlib.Path(sys.argv[2]), 60_000, seed=1), 60_000)\n"
    )
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
