"""The context mixing of fusion, held against the naive twin: drafts, probabilities and everything that is learnt."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import strategies
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mixer_twin import assert_same_knowledge, key_of, twin
from small_index import create

from freedraft.plugins import mixing
from freedraft.plugins.evidence import KINDS, OWN, OWN_FAR, SEPARATOR
from freedraft.plugins.registry import make_drafter
from freedraft.plugins.texts import SHORTENED
from freedraft.retrieval.growth import CHAIN_CAP
from freedraft.retrieval.ragged import ragged


def fusion(**options):
    return make_drafter("fusion", {"memory": "8MiB", "min_probability": 0, "max_tokens": 8, **options})


@st.composite
def sessions(draw):
    """Requests one after the other, from like texts: the prompt's length, and the text in pieces."""
    shared = draw(strategies.texts(max_size=24))
    requests = []
    for _ in range(draw(st.integers(1, 3))):
        text = (draw(strategies.texts(max_size=8)) + shared)[: draw(st.integers(0, 40))]
        cut = draw(st.integers(0, len(text)))
        requests.append((text[:cut], draw(strategies.pieces(text[cut:]))))
    return requests


@given(sessions(), st.integers(0, 8), st.sampled_from([0.0, 0.3]), st.sampled_from(["engine", "off"]))
@settings(max_examples=150)
def test_equals_naive(requests, budget, least, scope):
    whole = [prompt + [token for piece in pieces for token in piece] for prompt, pieces in requests]
    assume(all(len(naive.contexts(text[:n])) < CHAIN_CAP for text in whole for n in range(len(text) + 1)))
    assume(all(token != SEPARATOR for text in whole for token in text))
    ours = fusion(min_probability=least, scope=scope)
    reference = twin()
    replies: list[int] = []
    for number, (prompt, pieces) in enumerate(requests, 1):
        slots = ours.open(*ragged([prompt]))
        expected = naive.Fusing(reference, prompt, [replies], owner=0 if scope == "engine" else number)
        for piece in pieces:
            drafts = ours.draft(slots, np.array([budget], np.int32))
            tokens, probabilities = expected.draft(budget, least)
            assert drafts.tokens.tolist() == tokens
            assert drafts.probability == pytest.approx(probabilities, rel=1e-5)
            assert drafts.parents.tolist() == list(range(-1, len(tokens) - 1))
            ours.extend(slots, *ragged([piece]))
            expected.extend(piece)
        ours.close(slots)
        if scope == "engine" and expected.reply:
            replies += [*expected.reply, SEPARATOR]
    assert_same_knowledge(ours.mixer, reference)


def test_contexts_that_came_long_ago_are_a_kind_of_their_own():
    source = np.random.default_rng(0)
    text = [*range(1, 31), *source.integers(1000, 10**6, 240).tolist(), *range(1, 31), *source.integers(30, 40, 60)]
    ours, reference = fusion(scope="off"), twin()
    slots = ours.open(*ragged([text[:40]]))
    expected = naive.Fusing(reference, text[:40], owner=1)
    for token in text[40:]:
        drafts = ours.draft(slots, np.array([4], np.int32))
        tokens, probabilities = expected.draft(4, 0)
        assert drafts.tokens.tolist() == tokens
        assert drafts.probability == pytest.approx(probabilities, rel=1e-5)
        ours.extend(slots, *ragged([[int(token)]]))
        expected.extend([int(token)])
    assert_same_knowledge(ours.mixer, reference)
    kinds = ours.mixer.observed.reshape(KINDS, -1).sum(1)
    assert kinds[OWN] > 0
    assert kinds[OWN_FAR] > 0


@given(sessions(), st.data())
@settings(max_examples=60)
def test_equals_naive_with_corpora_and_references(tmp_path_factory, requests, data):
    whole = [prompt + [token for piece in pieces for token in piece] for prompt, pieces in requests]
    assume(all(len(naive.contexts(text[:n])) < CHAIN_CAP for text in whole for n in range(len(text) + 1)))
    assume(all(token != SEPARATOR for text in whole for token in text))
    corpora = [
        [text[data.draw(st.integers(0, 5)) :] + data.draw(strategies.texts(max_size=6)) for text in whole]
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    # Beyond, fewer contexts are looked at; a draft makes them longer.
    ends = [text[:n] for text in whole for n in range(len(text) + 1)]
    assume(all(naive.index_match(rows, text) < SHORTENED - 4 for rows in corpora for text in ends))
    folder = create(tmp_path_factory.mktemp("index"), *corpora)
    ours = fusion(scope="off", index=folder)
    reference = twin()
    for owner, (prompt, pieces) in enumerate(requests, 1):
        predicted = data.draw(strategies.texts(max_size=5)) + [token for piece in pieces for token in piece]
        cut = data.draw(st.integers(0, len(predicted)))
        predicted = predicted[:cut] + [3] + predicted[cut + 1 :]
        slots = ours.open(*ragged([prompt]))
        ours.refer(slots, *ragged([predicted]))
        expected = naive.Fusing(reference, prompt, [], predicted, corpora, owner)
        for piece in pieces:
            drafts = ours.draft(slots, np.array([4], np.int32))
            tokens, probabilities = expected.draft(4, 0)
            assert drafts.tokens.tolist() == tokens
            assert drafts.probability == pytest.approx(probabilities, rel=1e-5)
            ours.extend(slots, *ragged([piece]))
            expected.extend(piece)
        ours.close(slots)
    assert_same_knowledge(ours.mixer, reference)


def test_the_start_is_the_naive_one():
    started = mixing.start()
    reference = twin()
    for index in range(0, mixing.RATES, 7):
        assert started.rates[index] == pytest.approx(reference.rate(key_of(index)), rel=1e-6)
    assert started.correction == pytest.approx(np.array(reference.correction), rel=1e-6)
    assert not started.observed.any()
    by_kind = started.weights[:, : mixing.INPUTS].reshape(mixing.LENGTH_BUCKETS, KINDS, mixing.LENGTH_BUCKETS)
    for (chosen, kind, length), weight in np.ndenumerate(by_kind):
        assert weight == pytest.approx(reference._weight(chosen, (kind, length)), rel=1e-6)
    assert not started.weights[:, mixing.BIAS].any()


@given(st.floats(1e-4, 1 - 1e-4), st.integers(0, 9))
def test_nothing_is_corrected_before_anything_was_learnt(probability, run):
    # Linear between grid points half a unit of log-odds apart.
    assert mixing.correct(mixing.start(), run, probability) == pytest.approx(probability, abs=0.02)


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
def test_the_correction_learns_what_a_probability_is_worth(truth):
    mixer = mixing.start()
    source = np.random.default_rng(0)
    for right in source.random(2000) < truth:
        mixing.learn_correction(mixer, 1, 0.7, bool(right))
    assert mixing.correct(mixer, 1, 0.7) == pytest.approx(truth, abs=0.12)
    # Probabilities far from it stay as they were.
    assert mixing.correct(mixer, 1, 0.05) == pytest.approx(0.05, abs=0.01)


def test_what_the_correction_knows_of_other_runs_holds_until_it_knows_better():
    mixer = mixing.start()
    for _ in range(4000):
        mixing.learn_correction(mixer, 1, 0.7, False)
    assert mixing.correct(mixer, 0, 0.7) < 0.1
    for _ in range(4000):
        mixing.learn_correction(mixer, 0, 0.7, True)
    # Both are wrong of all runs together, which by now is somewhere between.
    assert mixing.correct(mixer, 0, 0.7) > 0.8
    assert mixing.correct(mixer, 1, 0.7) < 0.3


@pytest.mark.parametrize("truth", [0.1, 0.9])
def test_a_map_learns_what_odds_are_worth_with_one_token(truth):
    mixer = mixing.start()
    source = np.random.default_rng(0)
    for right in source.random(1000) < truth:
        mixing.learn_map(mixer, 0, 77, 0.4, float(right))
    assert mixing.squash(mixing.map_odds(mixer, 0, 77, 0.4)) == pytest.approx(truth, abs=0.12)
    # Other tokens, the other map, and odds far from it, stay as they were.
    for which, token, odds in ((0, 78, 0.4), (1, 77, 0.4), (0, 77, -3.0)):
        assert mixing.map_odds(mixer, which, token, odds) == pytest.approx(odds, abs=0.05)


@given(st.floats(-1e6, 1e6), st.integers(-1, 2**31 - 2))
def test_a_map_that_has_learnt_nothing_changes_nothing(odds, token):
    # It tells no less than LOWEST and no more than 1 - LOWEST.
    bounded = min(max(odds, mixing.stretch(mixing.LOWEST)), -mixing.stretch(mixing.LOWEST))
    assert mixing.map_odds(mixing.start(), 1, token, odds) == pytest.approx(bounded, abs=0.12)


@given(st.floats(-1e6, 1e6))
def test_squash_is_a_probability(odds):
    assert 0 < mixing.squash(odds) < 1


@given(st.floats(1e-6, 1 - 1e-6))
def test_stretch_undoes_squash(probability):
    assert mixing.squash(mixing.stretch(probability)) == pytest.approx(probability)


@given(st.integers(1, 300).flatmap(lambda seen: st.tuples(st.integers(0, seen), st.just(seen))))
def test_shares_have_a_bucket(counts):
    times, seen = counts
    share = mixing.share_bucket(times, seen)
    assert 0 <= share < mixing.SHARE_BUCKETS
    assert (share == 0) == (times == 0)
    if times:
        assert share >= mixing.share_bucket(times - 1, seen)


def test_buckets_have_upper_ends():
    for value in range(1, 70):
        assert mixing.bucket(mixing.LENGTHS, value) == sum(value > end for end in naive.MIX_LENGTHS)
        assert mixing.bucket(mixing.SEENS, value) == sum(value > end for end in naive.MIX_SEENS)


def test_learning_moves_towards_the_truth():
    """What is always right becomes likelier, what never is, less likely."""

    def repeated(follows):
        ours = fusion(scope="off")
        source = np.random.default_rng(1)
        slots = ours.open(*ragged([[1, 2, 3]]))
        ours.draft(slots, np.array([1], np.int32))
        for i in range(400):
            third = 3 if follows else int(source.integers(100, 10**6)) + i
            ours.extend(slots, *ragged([[int(source.integers(10**6, 10**8)), 1, 2, third]]))
        ours.extend(slots, *ragged([[1, 2]]))
        return ours.draft(slots, np.array([1], np.int32)).probability[0]

    assert repeated(True) > 0.95
    assert repeated(False) < 0.1


def test_weights_and_rates_stay_finite_on_text_that_misleads():
    ours = fusion(scope="off")
    slots = ours.open(*ragged([[0]]))
    ours.draft(slots, np.array([1], np.int32))
    text = [0]
    for i in range(3000):
        # Always another token than the one drafted.
        drafts = ours.draft(slots, np.array([1], np.int32))
        token = (int(drafts.tokens[0]) + 1) % 3 if len(drafts.tokens) else i % 3
        text.append(token)
        ours.extend(slots, *ragged([[token]]))
    assert all(np.isfinite(array).all() for array in ours.mixer)
    assert np.abs(ours.mixer.weights).max() < 10
    assert np.abs(ours.mixer.token_weights).max() < 10
    assert ours.mixer.rates.min() >= np.float32(mixing.LOWEST)
    assert ours.mixer.rates.max() <= np.float32(1 - mixing.LOWEST)
