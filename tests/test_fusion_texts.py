"""The texts that fusion draws on beside a sequence's own and earlier replies: references and corpora."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
from small_index import create

from freedraft.plugins.base import KeepsReplies, Source, TakesReference
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.index.errors import NotFoundError, TokenizerMismatchError
from freedraft.retrieval.index.format import NODE_FIELDS, TARGET, Section
from freedraft.retrieval.index.store import CorpusIndex
from freedraft.retrieval.ragged import ragged

PROMPT = list(range(100, 140))
EXPECTED = list(range(1000, 1040))


def fusion(**options):
    return make_drafter("fusion", {"memory": "8MiB", "min_probability": 0, "max_tokens": 8, **options})


def budgets(count, each=8):
    return np.full(count, each, np.int32)


class TestEndReply:
    def test_the_reply_is_a_source_and_the_next_message_is_none(self):
        made = fusion()
        assert isinstance(made, KeepsReplies)
        slots = made.open(*ragged([PROMPT]))
        made.draft(slots, budgets(1))
        reply, message = EXPECTED[:20], EXPECTED[20:]
        made.extend(slots, *ragged([reply]))
        made.end_reply(slots)
        made.extend(slots, *ragged([message]))
        others = made.open(*ragged([[1, *reply[:8]], [2, *message[:8]]]))
        drafts = made.draft(others, budgets(2))
        assert drafts.tokens[drafts.row(0)].tolist() == reply[8:16]
        assert not len(drafts.tokens[drafts.row(1)])
        made.draft(slots, budgets(1))
        made.extend(slots, *ragged([PROMPT[:20]]))
        made.close(np.concatenate([slots, others]))
        again = made.open(*ragged([[2, *message[:8]], [1, *PROMPT[:8]]]))
        drafts = made.draft(again, budgets(2))
        assert not len(drafts.tokens[drafts.row(0)])
        assert drafts.tokens[drafts.row(1)].tolist() == PROMPT[8:16]

    def test_a_reply_is_kept_once(self):
        made = fusion()
        kept = []
        slots = made.open(*ragged([PROMPT]))
        made.end_reply(slots)  # none has begun
        kept.append(made.automata.lengths(made.responses.slots[:1])[0])
        made.draft(slots, budgets(1))
        made.extend(slots, *ragged([EXPECTED]))
        made.end_reply(slots)
        made.end_reply(slots)
        made.close(slots)
        kept.append(made.automata.lengths(made.responses.slots[:1])[0])
        assert kept == [0, len(EXPECTED) + 1]  # and a separator


class TestReference:
    def test_its_beginning_is_expected_after_the_prompt(self):
        made = fusion()
        assert isinstance(made, TakesReference)
        slots = made.open(*ragged([PROMPT]))
        made.refer(slots, *ragged([EXPECTED]))
        drafts = made.draft(slots, budgets(1))
        assert drafts.tokens.tolist() == EXPECTED[:8]
        assert set(drafts.source.tolist()) == {Source.REFERENCE}

    def test_it_goes_on_after_an_edit(self):
        made = fusion()
        slots = made.open(*ragged([PROMPT]))
        made.refer(slots, *ragged([EXPECTED]))
        made.draft(slots, budgets(1))
        made.extend(slots, *ragged([[*EXPECTED[:4], 7, 8, 9, EXPECTED[6], EXPECTED[7]]]))
        assert made.draft(slots, budgets(1)).tokens.tolist() == EXPECTED[8:16]

    def test_each_sequence_has_its_own(self):
        made = fusion()
        slots = made.open(*ragged([PROMPT, PROMPT, PROMPT]))
        made.refer(slots, *ragged([EXPECTED, [], EXPECTED[20:]]))
        drafts = made.draft(slots, budgets(3))
        assert [drafts.tokens[drafts.row(i)].tolist() for i in range(3)] == [EXPECTED[:8], [], EXPECTED[20:28]]

    def test_it_ends_with_its_sequence(self):
        made = fusion(scope="off")
        free = made.automata.memory_used
        for _ in range(30):
            slots = made.open(*ragged([PROMPT]))
            made.refer(slots, *ragged([EXPECTED]))
            made.draft(slots, budgets(1))
            made.close(slots)
            assert made.automata.memory_used == free
        slots = made.open(*ragged([PROMPT]))
        assert not len(made.draft(slots, budgets(1)).tokens)

    def test_a_prompt_of_nothing(self):
        made = fusion()
        slots = made.open(*ragged([[]]))
        made.refer(slots, *ragged([EXPECTED]))
        assert not len(made.draft(slots, budgets(1)).tokens)
        made.extend(slots, *ragged([EXPECTED[:2]]))
        assert made.draft(slots, budgets(1)).tokens.tolist() == EXPECTED[2:10]

    def test_what_is_refused(self):
        made = fusion()
        slots = made.open(*ragged([PROMPT]))
        for bad, text in (([9], [1]), ([-1], [1]), (slots, [-3])):
            with pytest.raises(InputError):
                made.refer(np.array(bad), *ragged_ids(text))
        made.refer(slots, *ragged([EXPECTED]))
        with pytest.raises(InputError, match="without a draft or a reference"):
            made.refer(slots, *ragged([EXPECTED]))
        other = made.open(*ragged([PROMPT]))
        made.draft(other, budgets(1))
        with pytest.raises(InputError, match="without a draft"):
            made.refer(other, *ragged([EXPECTED]))


def ragged_ids(text):
    return np.array(text, np.int32), np.array([0, len(text)])


class TestCorpora:
    def test_it_is_drafted_from_and_named(self, tmp_path):
        made = fusion(index=create(tmp_path / "index", [EXPECTED], [[5, 6, 7] * 3]))
        slots = made.open(*ragged([[*PROMPT, *EXPECTED[:6]], [1, 5, 6, 7], [2, 3]]))
        drafts = made.draft(slots, budgets(3))
        assert drafts.tokens[drafts.row(0)].tolist() == EXPECTED[6:14]
        assert drafts.tokens[drafts.row(1)].tolist()[:5] == [5, 6, 7, 5, 6]
        assert not len(drafts.tokens[drafts.row(2)])
        assert set(drafts.source[drafts.row(0)].tolist()) == {Source.CORPUS}

    def test_several_indexes_and_segments(self, tmp_path):
        # Kernels are compiled anew for each power of two of segments, and other tests have up to four.
        rows = [[100 * i + j for j in range(30)] for i in range(4)]
        folders = [create(tmp_path / f"{i}", *([row] for row in some)) for i, some in enumerate((rows[:1], rows[1:]))]
        made = fusion(index=folders)
        slots = made.open(*ragged([row[:9] for row in rows]))
        drafts = made.draft(slots, budgets(4))
        assert [drafts.tokens[drafts.row(i)].tolist() for i in range(4)] == [row[9:17] for row in rows]

    def test_a_batch_is_as_each_sequence_alone(self, tmp_path):
        source = random.Random(3)
        rows = [[source.randrange(9) for _ in range(60)] for _ in range(4)]
        folder = create(tmp_path / "index", rows[:2], rows[1:3])
        together, alone = fusion(index=folder, scope="off"), [fusion(index=folder, scope="off") for _ in rows]
        slots = together.open(*ragged([row[:30] for row in rows]))
        drafts = together.draft(slots, budgets(4))
        for i, (made, row) in enumerate(zip(alone, rows, strict=True)):
            only = made.draft(made.open(*ragged([row[:30]])), budgets(1))
            assert drafts.tokens[drafts.row(i)].tolist() == only.tokens.tolist()
            assert drafts.probability[drafts.row(i)].tolist() == only.probability.tolist()

    def test_a_missing_index_and_another_tokenizer(self, tmp_path):
        with pytest.raises(NotFoundError, match="no index there"):
            fusion(index=str(tmp_path))
        folders = [create(tmp_path / name, [[1, 2]], fingerprint=name * 16) for name in ("aa", "bb")]
        with pytest.raises(TokenizerMismatchError, match="tokenizer of aa"):
            fusion(index=folders)
        with pytest.raises(ConfigError, match="index"):
            fusion(index=3)

    def test_damage_ends_the_segment_and_not_the_drafting(self, tmp_path, caplog):
        folder = create(tmp_path / "index", [[1, 2, 3, 4, 5, 1, 2, 3, 9]], [EXPECTED])
        damaged = CorpusIndex(folder).segments[0]
        content = bytearray(damaged.path.read_bytes())
        place = damaged.header.sections[Section.NODES]
        nodes = np.frombuffer(content, np.int32, place.size // 4, place.offset).reshape(-1, NODE_FIELDS)
        nodes[:, TARGET] = 2**30
        damaged.path.write_bytes(content)
        made = fusion(index=folder)
        with caplog.at_level(logging.WARNING, "freedraft"):
            slots = made.open(*ragged([[7, 1, 2, 3], EXPECTED[:5], [6, 6, 6, 6]]))
            for _ in range(2):
                drafts = made.draft(slots, budgets(3))
                made.extend(slots, *ragged([[4], [EXPECTED[5]], [6]]))
        assert caplog.text.count("fusion goes on without it") == 1
        assert damaged.path.name in caplog.text
        assert drafts.tokens[drafts.row(1)].tolist() == EXPECTED[6:14]
        assert drafts.tokens[drafts.row(2)].tolist() == [6] * 8
