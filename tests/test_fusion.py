"""Fusion as a drafter: batches, slots, scope, memory, saved predictors, and what the contract promises."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile

import naive
import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from freedraft.plugins import mixing
from freedraft.plugins.base import Drafter, Source
from freedraft.plugins.evidence import OWN, SEPARATOR
from freedraft.plugins.judging import MOST_LEARNT, NOT_DRAFTED, ROOT, foreseen_in_draft, is_learnt_from
from freedraft.plugins.registry import make_drafter
from freedraft.plugins.responses import AT_ONCE, MOST_WRITTEN
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.ragged import MAX_TOKEN, ragged

REPLY = list(range(1000, 1040))
MIXED = [[4, 5, 6, 7] * 5, list(range(50, 70)) * 2, [9] * 30, naive.fibonacci_word(60), [3, 1, 4, 1, 5, 9, 2, 6]]


def fusion(**options):
    return make_drafter("fusion", {"memory": "8MiB", "min_probability": 0, "max_tokens": 8, **options})


def budgets(count, each=8):
    return np.full(count, each, np.int32)


def parts(drafts):
    return [getattr(drafts, name).tolist() for name in ("tokens", "parents", "probability", "source", "offsets")]


def assert_keeps_the_contract(drafts, limits):
    lengths = np.diff(drafts.offsets)
    assert drafts.offsets[0] == 0
    assert drafts.offsets[-1] == len(drafts.tokens)
    assert (lengths <= np.maximum(limits, 0)).all()
    assert ((drafts.probability >= 0) & (drafts.probability <= 1)).all()
    for i in range(len(limits)):
        row = drafts.row(i)
        assert (np.diff(drafts.probability[row]) <= 0).all()
        assert drafts.parents[row].tolist() == list(range(-1, lengths[i] - 1))
    assert set(drafts.source.tolist()) <= {Source.OWN_TEXT, Source.RESPONSES}


def run_request(made, prompt, reply, piece=3):
    """Draft for and commit `reply` in pieces, then close; return all that was drafted."""
    slots = made.open(*ragged([prompt]))
    seen: list[int] = []
    for at in range(0, len(reply), piece):
        drafts = made.draft(slots, budgets(1))
        assert_keeps_the_contract(drafts, budgets(1))
        seen += drafts.tokens.tolist()
        made.extend(slots, *ragged([reply[at : at + piece]]))
    made.close(slots)
    return seen


def test_is_a_drafter():
    assert isinstance(fusion(), Drafter)


@given(st.lists(strategies.texts(max_size=40), min_size=1, max_size=4), st.lists(st.integers(-1, 12), min_size=4))
@settings(max_examples=60)
def test_random_text_keeps_the_contract(texts, limits):
    made = fusion()
    slots = made.open(*ragged(texts))
    budget = np.array(limits[: len(texts)], np.int32)
    for _ in range(2):
        drafts = made.draft(slots, budget)
        assert_keeps_the_contract(drafts, budget)
        known = {token for text in texts for token in text}
        assert set(drafts.tokens.tolist()) <= known
        made.extend(slots, *ragged([text[:5] for text in texts]))
    made.close(slots)
    assert made.automata.memory_used <= 8 * 2**20


@pytest.mark.parametrize("text", [[], [7], [7, 7], [0], [MAX_TOKEN - 1] * 9, [5] * 700, naive.de_bruijn(2, 9)])
def test_hard_text(text):
    made = fusion()
    slots = made.open(*ragged([text]))
    for token in (*text[:3], 1, 1, 2):
        drafts = made.draft(slots, budgets(1))
        assert_keeps_the_contract(drafts, budgets(1))
        made.extend(slots, *ragged([[token]]))
    made.close(slots)


def test_a_run_is_drafted_on():
    made = fusion()
    drafts = made.draft(made.open(*ragged([[7] * 40])), budgets(1))
    assert drafts.tokens.tolist() == [7] * 8


def test_a_floor_ends_drafts_early_and_changes_nothing_else():
    text = [4, 5, 6, 7, 4, 5, 6, 8, 4, 5, 6, 7, 4]
    made = fusion()
    slots = made.open(*ragged([text]))
    whole = made.draft(slots, budgets(1))
    made.floor = 0.3
    cut = made.draft(slots, budgets(1))
    kept = int((whole.probability >= 0.3).sum())
    assert 0 < kept < len(whole.tokens)
    assert cut.tokens.tolist() == whole.tokens[:kept].tolist()


def test_the_separator_is_never_drafted():
    made = fusion()
    for _ in range(3):
        seen = run_request(made, [1, 2, 3], [5, 6, 5, 6, 8])
        assert SEPARATOR not in seen
    # A text that has it in it, though no vocabulary does, is survived.
    assert SEPARATOR not in run_request(made, [SEPARATOR, 1] * 6, [SEPARATOR, 1] * 6)


def test_a_batch_is_as_each_sequence_alone():
    """One call for many rows does what a call for each row, in order, does: drafts and all that is learnt.

    Where replies are no source for one another, as they are in a batch.
    """
    together, apart = fusion(scope="off"), fusion(scope="off")
    slots = together.open(*ragged(MIXED))
    alone = [apart.open(*ragged([text])) for text in MIXED]
    source = np.random.default_rng(0)
    for _ in range(30):
        drafts = together.draft(slots, budgets(len(MIXED)))
        pieces = []
        for i, one in enumerate(alone):
            row = drafts.row(i)
            expected = apart.draft(one, budgets(1))
            assert drafts.tokens[row].tolist() == expected.tokens.tolist()
            assert drafts.probability[row].tolist() == expected.probability.tolist()
            assert drafts.source[row].tolist() == expected.source.tolist()
            accepted = expected.tokens[: source.integers(0, 4)].tolist()
            pieces.append([*accepted, MIXED[i][int(source.integers(len(MIXED[i])))]])
        together.extend(slots, *ragged(pieces))
        for one, piece in zip(alone, pieces, strict=True):
            apart.extend(one, *ragged([piece]))
    for ours, theirs in zip(together.mixer, apart.mixer, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_threads_change_nothing(rows):
    one, four = fusion(memory="64MiB"), fusion(memory="64MiB", threads=4)
    texts = [[*MIXED[i % len(MIXED)], i % 7, *MIXED[i % len(MIXED)]] for i in range(rows)]
    for drafter in (one, four):
        slots = drafter.open(*ragged(texts))
        for token in (5, 6):
            drafter.draft(slots, budgets(rows))
            drafter.extend(slots, np.full(rows, token, np.int32), np.arange(rows + 1))
    assert parts(one.draft(slots, budgets(rows))) == parts(four.draft(slots, budgets(rows)))


class TestLargeBatches:
    """Of more replies than `MOST_LEARNT` a part is learnt from at each step."""

    @pytest.mark.parametrize("replies", [1, MOST_LEARNT, MOST_LEARNT + 1, 256, 1000])
    def test_about_so_many_are_learnt_from_and_each_has_its_turn(self, replies):
        length = 5000 + 37 * np.arange(replies)
        turns = np.array(
            [[is_learnt_from(slot, length[slot] + 2 * step, replies) for slot in range(replies)] for step in range(50)]
        )
        if replies <= MOST_LEARNT:
            assert turns.all()
        else:
            share = MOST_LEARNT / replies
            assert turns.sum(axis=1) == pytest.approx(MOST_LEARNT, rel=0.1)
            assert turns.mean(axis=0) == pytest.approx(share, abs=0.1)

    @pytest.mark.parametrize("shape", ["chain", "tree"])
    @pytest.mark.parametrize("text", MIXED)
    @pytest.mark.parametrize("right", [True, False])
    def test_what_the_draft_weighed_is_judged_as_if_it_were_weighed_again(self, text, right, shape):
        made = fusion(scope="off", shape=shape)
        slots = made.open(*ragged([text]))
        judged_some = 0
        for _ in range(5):
            drafts = made.draft(slots, budgets(1))
            token = int(drafts.tokens[0]) if right and len(drafts.tokens) else 77
            by_draft = copy.deepcopy(made._judged)
            looked = foreseen_in_draft(by_draft, slots[0], ROOT, token)
            made.extend(slots, *ragged([[token]]))
            if looked:
                assert by_draft.bias[slots] == pytest.approx(made._judged.bias[slots], abs=1e-6)
                assert by_draft.run[slots] == made._judged.run[slots]
                judged_some += 1
        assert judged_some > 0

    def test_behind_what_was_not_right_the_draft_did_not_look(self):
        made = fusion(scope="off")
        slots = made.open(*ragged([MIXED[0]]))
        made.draft(slots, budgets(1, 3))
        before = copy.deepcopy(made._judged)
        assert not foreseen_in_draft(made._judged, slots[0], NOT_DRAFTED, 4)
        assert not foreseen_in_draft(made._judged, slots[0], 2, 7)
        assert all(np.array_equal(now, then) for now, then in zip(made._judged, before, strict=True))
        assert foreseen_in_draft(made._judged, slots[0], 1, 6)
        assert made._judged.run[slots] == 1

    def test_what_is_not_learnt_from_is_judged_all_the_same(self):
        rows = 2 * MOST_LEARNT
        made = fusion(memory="64MiB", scope="off")
        slots = made.open(*ragged([[4, 5, 6, 7] * 5] * rows))
        new = np.full(rows, 4, np.int32)
        offsets = np.arange(rows + 1)
        for step in range(6):
            assert (np.diff(made.draft(slots, budgets(rows)).offsets) > 0).all()
            before = made.mixer.mapped.sum()
            made.extend(slots, (new + step) % 4 + 4, offsets)
            learnt = made.mixer.mapped.sum() - before
            one = fusion(scope="off")
            alone = one.open(*ragged([[4, 5, 6, 7] * 5]))
            one.draft(alone, budgets(1))
            one.extend(alone, *ragged([[4]]))
            # What one sequence alone has learnt in a step tells how many of these were learnt from.
            assert learnt == pytest.approx(MOST_LEARNT * one.mixer.mapped.sum(), rel=0.15)
            # All texts are alike, so all that is kept of each sequence has to be.
            assert (made._judged.run[slots] == step + 1).all()
            bias = made._judged.bias[slots]
            assert bias == pytest.approx(np.broadcast_to(bias[0], bias.shape), abs=0.02)
            assert (bias[:, OWN] > 0).all()


def test_an_error_in_one_thread_is_raised():
    drafter = fusion(threads=4)
    slots = drafter.open(*ragged([[1, 2, 1]] * 200))
    slots[150] = 1000
    with pytest.raises(InputError, match="slots: expected open ones"):
        drafter.draft(slots, budgets(200))


@given(strategies.texts(max_size=50), st.data())
@settings(max_examples=60)
def test_drafts_depend_on_the_committed_text_alone(text, data):
    """However a prompt came, and however often a sequence was dropped and built anew."""
    made = fusion(scope="engine")
    run_request(made, text[:10], text, piece=7)  # so that there are earlier replies
    expected = parts(made.draft(made.open(*ragged([text])), budgets(1)))
    slots = made.open(*ragged([[]]))
    for piece in data.draw(strategies.pieces(text)):
        made.extend(slots, *ragged([piece]))
    assert parts(made.draft(slots, budgets(1))) == expected
    # Learning is put aside: it goes on with every committed token of a reply, and is shared.
    learnt = type(made.mixer)(*(array.copy() for array in made.mixer))
    successors = made._successors.copy()
    grown = made.open(*ragged([text[:3]]))
    for token in text[3:]:
        made.draft(grown, budgets(1))
        made.extend(grown, *ragged([[token]]))
    made.mixer = learnt
    made._successors = successors
    made._judged.bias[grown] = made._judged.run[grown] = 0
    assert parts(made.draft(grown, budgets(1))) == expected


def test_a_reused_slot_remembers_nothing():
    made, fresh = fusion(scope="off"), fusion(scope="off")
    for text in MIXED:
        slots = made.open(*ragged([text]))
        made.draft(slots, budgets(1))
        made.close(slots)
    for text in MIXED:
        slots = made.open(*ragged([text]))
        assert parts(made.draft(slots, budgets(1))) == parts(fresh.draft(fresh.open(*ragged([text])), budgets(1)))
        made.close(slots)
    assert made.automata.memory_used == 0


def test_nothing_is_held_against_a_new_reply():
    made = fusion(scope="off")
    slots = made.open(*ragged([[1, 2, 3, 1, 2]]))
    for _ in range(2):
        made.draft(slots, budgets(1))
        made.extend(slots, *ragged([[3, 1, 2, 3, 9]]))
        assert made._judged.bias[slots].any()
        made.end_reply(slots)
        made.draft(slots, budgets(1))
        assert not made._judged.bias[slots].any()
        assert not made._judged.run[slots].any()


class TestScope:
    def test_engine_drafts_from_earlier_replies(self):
        made = fusion()
        run_request(made, [1, 2, 3], REPLY)
        slots = made.open(*ragged([[1, 2, 3]]))
        made.draft(slots, budgets(1))
        made.extend(slots, *ragged([REPLY[:4]]))
        drafts = made.draft(slots, budgets(1))
        assert drafts.tokens[:4].tolist() == REPLY[4:8]
        assert set(drafts.source.tolist()) == {Source.RESPONSES}

    def test_off_never_drafts_anothers_token(self):
        made = fusion(scope="off")
        for i in range(5):
            run_request(made, [1, 2, 3], [token + 100 * i for token in REPLY])
        slots = made.open(*ragged([[1, 2, 3], REPLY[:9]]))
        for at in range(0, 36, 2):
            drafts = made.draft(slots, budgets(2))
            assert Source.RESPONSES not in drafts.source.tolist()
            # The first has only counted up so far, so nothing in its own text can be drafted; nor in the second's.
            assert not len(drafts.tokens)
            made.extend(slots, *ragged([REPLY[at : at + 2], [at + 5000, at + 5001]]))
        assert (made.responses.slots == -1).all()

    def test_a_prompt_is_never_drafted_from(self):
        made = fusion()
        secret = list(range(7000, 7030))
        run_request(made, secret, REPLY)
        slots = made.open(*ragged([secret[:10]]))
        assert not len(made.draft(slots, budgets(1)).tokens)

    @pytest.mark.parametrize("scope", ["engine", "off"])
    def test_replies_that_are_written_at_once_are_drafted_from_one_another(self, scope):
        made = fusion(scope=scope)
        slots = made.open(*ragged([[1, 2], [1, 2]]))
        made.draft(slots, budgets(2))
        made.extend(slots, *ragged([REPLY, REPLY[:5]]))
        drafts = made.draft(slots, budgets(2))
        assert not len(drafts.tokens[drafts.row(0)])
        row = drafts.row(1)
        if scope == "off":
            assert not len(drafts.tokens[row])
        else:
            assert drafts.tokens[row].tolist() == REPLY[5:13]
            assert set(drafts.source[row].tolist()) == {Source.RESPONSES}

    def test_prompts_that_are_read_at_once_are_not(self):
        made = fusion()
        slots = made.open(*ragged([[1, 2, 3], [1, 2, 3]]))
        made.draft(slots, budgets(2))
        others = made.open(*ragged([REPLY[:5]]))
        made.extend(others, *ragged([REPLY[5:]]))
        made.extend(slots, *ragged([REPLY[:5], REPLY[:4]]))
        drafts = made.draft(slots, budgets(2))
        assert not len(drafts.tokens[drafts.row(0)])
        assert drafts.tokens[drafts.row(1)].tolist() == [REPLY[4]]

    def test_a_reply_that_is_alone_is_taken_in_when_it_has_ended(self):
        made = fusion()
        slots = made.open(*ragged([[1, 2]]))
        made.draft(slots, budgets(1))
        made.extend(slots, *ragged([REPLY]))
        assert not made.automata.lengths(made.responses.slots[:1])[0]
        made.close(slots)
        assert made.automata.lengths(made.responses.slots[:1])[0] == len(REPLY) + 1

    def test_of_very_many_at_once_each_is_taken_in_when_it_has_ended(self):
        made = fusion(memory="64MiB")
        slots = made.open(*ragged([[1, 2]] * (MOST_WRITTEN + 1)))
        made.draft(slots, budgets(len(slots)))
        made.extend(slots, *ragged([REPLY] * len(slots)))
        assert not made.automata.lengths(made.responses.slots[:1])[0]
        for turn in (1, 2):
            made.extend(slots[1:], *ragged([[turn]] * MOST_WRITTEN))
            known = min(turn * AT_ONCE, len(REPLY) + turn) * MOST_WRITTEN
            assert made.automata.lengths(made.responses.slots[:1])[0] == known

    def test_a_generation_that_is_full_makes_room_while_replies_are_written(self):
        made = fusion(memory="64MiB", response_tokens=1000)
        slots = made.open(*ragged([[1, 2]] * 4))
        source = np.random.default_rng(0)
        for _ in range(100):
            made.draft(slots, budgets(4))
            made.extend(slots, *ragged(source.integers(0, 9, (4, 10)).tolist()))
            assert made.automata.lengths(made.responses.slots[:1])[0] < 1000
        made.close(slots)


class TestMemory:
    def test_replies_for_ever_stay_bounded(self):
        made = fusion(memory="1MiB", response_tokens=1000)
        source = np.random.default_rng(0)
        most = 0
        for _ in range(80):
            run_request(made, [1], source.integers(0, 50, 120).tolist(), piece=60)
            most = max(most, made.automata.memory_used)
        assert 0 < most <= 2**20
        # Two generations hold at least the newest reply's worth, and there is room for sequences.
        slots = made.open(*ragged([source.integers(0, 50, 400).tolist()]))
        assert made.automata.learning(slots).all()

    def test_small_memory_leaves_half_to_the_sequences(self):
        made = fusion(memory="1MiB", response_tokens=500_000)
        source = np.random.default_rng(0)
        for _ in range(60):
            run_request(made, [1], source.integers(0, 5000, 300).tolist(), piece=100)
            assert made.automata.memory_used <= 0.75 * 2**20

    def test_a_full_arena_still_drafts(self):
        made = fusion(memory="1MiB")
        source = np.random.default_rng(0)
        slots = made.open(*ragged([source.integers(0, 1000, 20_000).tolist(), [1, 2, 3] * 9]))
        assert not made.automata.learning(slots).all()
        for _ in range(20):
            drafts = made.draft(slots, budgets(2))
            assert_keeps_the_contract(drafts, budgets(2))
            made.extend(slots, *ragged([[5, 6, 7], [1, 2, 3]]))
        made.close(slots)
        run_request(made, [1, 2, 3], [4, 5, 6] * 10)
        drafts = made.draft(made.open(*ragged([[1, 2, 3] * 9])), budgets(1))
        assert drafts.tokens.tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


class TestErrors:
    def test_bad_settings(self):
        for bad in ({"scope": "everyone"}, {"max_tokens": 0}, {"min_probability": 2}, {"response_tokens": 5}):
            with pytest.raises(ConfigError):
                fusion(**bad)

    def test_bad_slots(self):
        made = fusion()
        slots = made.open(*ragged([[1, 2, 3]]))
        for bad in ([5], [-1], [99]):
            wrong = np.array(bad)
            for call in (
                lambda wrong=wrong: made.draft(wrong, budgets(1)),
                lambda wrong=wrong: made.extend(wrong, *ragged([[1]])),
                lambda wrong=wrong: made.close(wrong),
            ):
                with pytest.raises(InputError, match="slots"):
                    call()
        with pytest.raises(InputError, match="distinct"):
            made.close(np.repeat(slots, 2))
        made.close(slots)
        with pytest.raises(InputError, match="slots"):
            made.close(slots)

    def test_a_closed_slot_gives_nothing_away(self):
        """A second close must not take in what the slot's pages hold by now."""
        made = fusion()
        run_request(made, [1], list(range(300, 340)))
        held = made.automata.lengths(made.responses.slots[:1])[0]
        with pytest.raises(InputError):
            made.close(np.array([1]))
        assert made.automata.lengths(made.responses.slots[:1])[0] == held

    def test_bad_tokens_change_nothing(self):
        made = fusion()
        slots = made.open(*ragged([[1, 2, 3] * 5]))
        before = parts(made.draft(slots, budgets(1)))
        with pytest.raises(InputError, match="negative"):
            made.extend(slots, np.array([1, -5], np.int32), np.array([0, 2]))
        with pytest.raises(InputError, match="negative"):
            made.open(np.array([-5], np.int32), np.array([0, 1]))
        assert parts(made.draft(slots, budgets(1))) == before

    def test_one_budget_a_slot(self):
        made = fusion()
        with pytest.raises(InputError, match="budget"):
            made.draft(made.open(*ragged([[1]])), budgets(2))


class TestSavedPredictor:
    @pytest.fixture
    def taught(self):
        made = fusion()
        for text in MIXED:
            run_request(made, text[:10], text * 2)
        return made

    def test_round_trip(self, taught, tmp_path):
        taught.save(tmp_path / "learnt")
        other = fusion()
        other.load(tmp_path / "learnt")
        for ours, theirs in zip(taught.mixer, other.mixer, strict=True):
            assert np.array_equal(ours, theirs)
        assert [path.name for path in tmp_path.iterdir()] == ["learnt"]
        run_request(other, [1, 2], [1, 2] * 9)  # and goes on learning

    def test_a_setting_names_it(self, taught, tmp_path):
        taught.save(tmp_path / "learnt.npz")
        made = fusion(learnt=str(tmp_path / "learnt.npz"))
        assert np.array_equal(made.mixer.weights, taught.mixer.weights)
        with pytest.raises(ConfigError, match="learnt"):
            fusion(learnt=str(tmp_path / "none.npz"))

    def saved(self, made, tmp_path, **changes):
        path = tmp_path / "changed.npz"
        np.savez(path, **{**made.mixer._asdict(), **changes})
        return path

    def test_hostile_arrays_are_refused(self, taught, tmp_path):
        rates = taught.mixer.rates
        spoilt = rates.copy()
        spoilt[5] = np.nan
        for bad in (spoilt, rates[:-1], rates.astype(np.float64), rates.reshape(2, -1), rates.astype(object)):
            with pytest.raises(InputError, match="changed"):
                fusion().load(self.saved(taught, tmp_path, rates=bad))

    def test_hostile_values_are_bounded(self, taught, tmp_path):
        made = fusion()
        made.load(
            self.saved(
                taught,
                tmp_path,
                observed=np.full_like(taught.mixer.observed, -3),
                weights=np.full_like(taught.mixer.weights, 3e38),
                token_weights=np.full_like(taught.mixer.token_weights, -3e38),
                rates=np.full_like(taught.mixer.rates, 7),
                correction=np.full_like(taught.mixer.correction, -7),
            )
        )
        run_request(made, [1, 2], [1, 2, 3] * 30)
        assert all(np.isfinite(array).all() for array in made.mixer)

    def test_files_that_are_none(self, taught, tmp_path):
        taught.save(tmp_path / "learnt.npz")
        whole = (tmp_path / "learnt.npz").read_bytes()
        single = io.BytesIO()
        np.save(single, taught.mixer.rates)
        contents = {
            "empty": b"",
            "text": b"not a predictor",
            "cut": whole[: len(whole) // 2],
            "changed": whole[:2000] + bytes(50) + whole[2050:],
            "pickle": pickle.dumps({"rates": 1}),
            "array": single.getvalue(),
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            before = taught.mixer
            with pytest.raises(InputError, match=name):
                taught.load(tmp_path / name)
            assert taught.mixer is before
        with pytest.raises(InputError):
            taught.load(tmp_path / "missing")

    def test_a_bomb_is_not_unpacked(self, tmp_path):
        path = tmp_path / "bomb.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in mixing.Mixer._fields:
                archive.writestr(f"{name}.npy", bytes(50_000_000))
        with pytest.raises(InputError, match="too many"):
            fusion().load(path)


def test_probabilities_are_calibrated_on_text_of_known_chances():
    """Sources that go one way three times of four: the probability settles there, and holds what it says."""
    judged = np.zeros((10, 3))
    for seed in range(4):
        source = np.random.default_rng(seed)
        made = fusion(max_tokens=4)
        slots = made.open(*ragged([[1]]))
        for step in range(6000):
            drafts = made.draft(slots, budgets(1, 1))
            kind = step % 2
            token = int(10 + kind if source.random() < (0.75, 0.4)[kind] else source.integers(100, 10**6))
            if step > 1000 and len(drafts.tokens):
                p = float(drafts.probability[0])
                judged[min(int(10 * p), 9)] += (1, drafts.tokens[0] == token, p)
            made.extend(slots, *ragged([[token]]))
    checked = judged[judged[:, 0] >= 500]
    assert len(checked)
    assert np.abs((checked[:, 1] - checked[:, 2]) / checked[:, 0]).max() < 0.05
