"""The scan against its definition: the CPU's twin here, the CUDA kernels by the same tests under Numba's simulator.

The simulator must be chosen before numba.cuda is imported, so these tests run themselves again in another process.
"""

from __future__ import annotations

import naive_scan
import numpy as np
import pytest
import scan_batches
from cuda_simulator import SIMULATED, assert_passes_simulated, give_way
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from strategies import texts

from freedraft.retrieval.cuda.on_cpu import draft_on_cpu
from freedraft.retrieval.cuda.rules import Rules
from freedraft.retrieval.errors import InputError

RULES = [Rules(), Rules(5, 2, budget=2), Rules(1, 1), Rules(64, 3)]
ADVERSARIAL = scan_batches.adversarial()


def on_gpu(*arguments, blocks=9, threads=8):
    from freedraft.retrieval.cuda.on_gpu import DeviceScan

    tokens, drafts = arguments[0], arguments[4]
    DeviceScan(max(1, len(drafts)), tokens.shape[1], blocks=blocks, threads=threads).draft(*arguments)


draft = on_gpu if SIMULATED else draft_on_cpu


def drafted(batch, columns, rules, call=draft):
    """What `call` writes into poisoned memory."""
    n = len(batch.rows)
    drafts = np.full((n, columns), -99, np.int64)
    probability = np.full((n, columns), np.nan, np.float32)
    counts = np.full(n, -99, np.int32)
    call(*batch, drafts, probability, counts, rules)
    return drafts, probability, counts


def expected(batch, columns, rules):
    width = batch.tokens.shape[1]
    drafts, probability, counts = [], [], []
    for slot, active in zip(batch.rows.tolist(), batch.active.tolist(), strict=True):
        text = []
        if 0 <= slot < len(batch.tokens):
            text = batch.tokens[slot, : min(max(int(batch.lengths[slot]), 0), width)].tolist()
        room = min(columns, rules.limit(columns), width - len(text)) if active > 0 else 0
        tokens, chances = naive_scan.draft(
            text, room, longest=rules.longest, shortest=rules.shortest, least=rules.least
        )
        missing = columns - len(tokens)
        drafts.append(tokens + [text[-1] if text else 0] * missing)
        probability.append(chances + [0.0] * missing)
        counts.append(len(tokens))
    return np.array(drafts).reshape(-1, columns), np.array(probability).reshape(-1, columns), np.array(counts)


def assert_equal(batch, columns, rules, call=draft):
    before = batch.tokens.copy()
    got = drafted(batch, columns, rules, call)
    for ours, theirs in zip(got, expected(batch, columns, rules), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(batch.tokens, before)


@pytest.mark.parametrize("rules", RULES[:2] if SIMULATED else RULES, ids=str)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_batches(name, rules):
    assert_equal(ADVERSARIAL[name], 6, rules)


@pytest.mark.parametrize("seed", range(3 if SIMULATED else 40))
def test_random_batches(seed):
    generator = np.random.default_rng(seed)
    rules = Rules(
        int(generator.integers(3, 70)), int(generator.integers(1, 4)), None, float(generator.choice([0, 0.3]))
    )
    assert_equal(scan_batches.random_batch(generator), int(generator.integers(1, 9)), rules)


@pytest.mark.skipif(SIMULATED, reason="hundreds of examples are minutes under the simulator")
@hypothesis_settings(max_examples=150)
@given(st.lists(texts(max_size=60), min_size=1, max_size=4), st.integers(1, 70), st.integers(0, 30))
def test_texts(some, longest, spare):
    width = max(1, max(len(text) for text in some) + spare)
    assert_equal(scan_batches.batch(some, width), 5, Rules(longest))


def test_the_longest_match_wins_and_the_most_recent_of_equals():
    # 1 2 3 occurs twice, followed by 4 and then by 5; 2 3 alone also by 6, which is more recent.
    text = [1, 2, 3, 4, 1, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3]
    assert naive_scan.places(text, 64, 1, 4) == [(3, 7), (3, 3), (2, 11)]
    drafts, probability, counts = drafted(scan_batches.batch([text], 32), 3, Rules())
    assert drafts[0].tolist() == [5, 9, 2]
    assert probability[0, 0] == np.float32(9 / (9 + 9 + 4 + 4))
    assert counts.tolist() == [3]


def test_periodic_text_is_continued_for_as_long_as_asked():
    drafts, _, counts = drafted(scan_batches.batch([[1, 2, 3, 1, 2]], 64), 9, Rules())
    assert drafts[0].tolist() == [3, 1, 2, 3, 1, 2, 3, 1, 2]
    assert counts.tolist() == [9]


def test_a_draft_ends_before_an_unlikely_token():
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    drafts, probability, counts = drafted(scan_batches.batch([text], 32), 4, Rules(least=0.4))
    assert drafts[0].tolist() == [4, 5, 3, 3]
    np.testing.assert_allclose(probability[0], [9 / 13, (9 / 13) ** 2, 0, 0], rtol=1e-6)
    assert counts.tolist() == [2]


def test_nothing_is_drafted_beyond_the_width():
    drafts, _, counts = drafted(scan_batches.batch([[1, 2, 1, 2, 1, 2]], 8), 5, Rules())
    assert drafts[0].tolist() == [1, 2, 2, 2, 2]
    assert counts.tolist() == [2]


@pytest.mark.parametrize("change", ["tokens", "lengths", "rows", "active", "drafts", "probability", "counts"])
def test_wrong_types_are_refused(change):
    names = ["tokens", "lengths", "rows", "active", "drafts", "probability", "counts"]
    batch = scan_batches.batch([[1, 2, 1]], 8)
    arrays = [*batch, np.zeros((1, 2), np.int64), np.zeros((1, 2), np.float32), np.zeros(1, np.int32)]
    at = names.index(change)
    arrays[at] = arrays[at].astype(np.float64)
    with pytest.raises(InputError, match=f"^{change}: expected "):
        draft(*arrays, Rules())


@pytest.mark.parametrize("bad", [{"longest": 0}, {"shortest": 0}, {"longest": 2, "shortest": 3}, {"budget": -1}])
def test_rules_that_find_nothing_are_refused(bad):
    with pytest.raises(InputError, match=r"^rules: "):
        Rules(**bad)


if SIMULATED:
    give_way()

    @pytest.mark.parametrize(("blocks", "threads"), [(1, 8), (9, 16), (1000, 8)])
    def test_any_partition_finds_the_same(blocks, threads):
        def call(*arguments):
            on_gpu(*arguments, blocks=blocks, threads=threads)

        texts = [[1, 2, 3, 1, 2, 4, 1, 2, 3, 3, 1, 2], [5] * 20, list(range(20))]
        assert_equal(scan_batches.batch(texts, 24), 4, Rules(), call)

    @pytest.mark.parametrize("blocks", [12, 36, 1000])
    def test_a_place_is_found_wherever_it_is(blocks):
        """In every tile (64 tokens here), first and last of it, with a match that begins in the one before.

        A row gets 1, 3 or 4 blocks.
        """

        def call(*arguments):
            on_gpu(*arguments, blocks=blocks, threads=8)

        ends = [5, 6, 63, 64, 65, 127, 128, 129, 130, 191, 192, 193]
        texts = []
        for end in ends:
            text = list(range(100, 300))
            text[end - 4 : end + 1] = [1, 2, 3, 4, 5]
            texts.append([*text, 1, 2, 3, 4])
        batch = scan_batches.batch(texts, 208)
        assert expected(batch, 1, Rules(shortest=4))[0].tolist() == [[5]] * len(ends)
        assert_equal(batch, 2, Rules(shortest=4), call)

    @pytest.mark.parametrize("longest", [7, 8, 9, 20, 150])
    def test_matches_longer_than_what_is_staged(longest):
        """8 tokens are staged before a tile here; the match is of 16 or more tokens, and of less in other places."""
        block = list(range(1, 17))
        text = [*block, 50, *block[5:], 51, *block[-8:], 52, *block[-7:], 53, *block, 54, *block[1:], 55, *([7] * 60)]
        batch = scan_batches.batch([[*text, *block], [*block, *text, *block], text], 256)
        assert_equal(batch, 3, Rules(longest), on_gpu)

    def test_a_workspace_serves_every_step():
        """Rows change owner, grow and shrink between steps; what an earlier step left behind is not seen."""
        from freedraft.retrieval.cuda.on_gpu import DeviceScan

        scan = DeviceScan(6, 80, blocks=9, threads=8)
        generator = np.random.default_rng(5)
        for rows in (6, 2, 4):
            assert_equal(scan_batches.random_batch(generator, rows), 3, Rules(), scan.draft)

    def test_a_workspace_refuses_what_it_is_too_small_for():
        from freedraft.retrieval.cuda.on_gpu import DeviceScan

        with pytest.raises(InputError, match="made for 1 rows of 8 tokens, got 2 of 8"):
            drafted(scan_batches.batch([[1], [2]], 8), 2, Rules(), DeviceScan(1, 8).draft)
        with pytest.raises(InputError, match="made for 1 rows of 8 tokens, got 1 of 9"):
            drafted(scan_batches.batch([[1]], 9), 2, Rules(), DeviceScan(1, 8).draft)

    @pytest.mark.parametrize(
        "bad",
        [{"batch": 0}, {"batch": 65536}, {"width": 0}, {"threads": 4}, {"threads": 9}, {"threads": 512}, {"blocks": 0}],
    )
    def test_impossible_sizes_are_refused(bad):
        from freedraft.retrieval.cuda.on_gpu import DeviceScan

        with pytest.raises(InputError, match=r"^device scan: "):
            DeviceScan(**{"batch": 1, "width": 8, **bad})

else:

    def test_the_kernels_pass_these_tests_under_the_simulator():
        assert_passes_simulated(__file__, jit=True)
