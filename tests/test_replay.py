"""`freedraft replay` and `measure-cost`: input, cost curves, the simulation against by-hand counts, the commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import drafters
import numpy as np
import pytest
from small_index import create
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from freedraft.integrations import cli
from freedraft.integrations.replay import runs, simulate
from freedraft.integrations.replay.costs import CPU, GPU, Cost, linear, read_cost, write_cost
from freedraft.integrations.replay.recorded import Request, read_requests
from freedraft.integrations.replay.simulate import plain_time, replay, told_pacer
from freedraft.plugins.base import Drafts
from freedraft.plugins.pacing import Pacer, PacingSettings
from freedraft.plugins.registry import make_drafter
from freedraft.retrieval.errors import InputError, UnsupportedError
from freedraft.retrieval.index.errors import NotFoundError, TokenizerMismatchError
from freedraft.retrieval.index.fingerprint import tokenizer_fingerprint


class Words:
    """A tokenizer: a word is a token, its id its length; chats are `<role> content.` a message."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        text = " ".join(f"<{message['role']}> {message['content']} ." for message in messages)
        return text + " <assistant>" * add_generation_prompt


def requests_of(*pairs):
    return [Request(np.array(prompt, np.int32), np.array(reply, np.int32)) for prompt, reply in pairs]


def lines(tmp_path: Path, *rows) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def as_lists(requests):
    return [(request.prompt.tolist(), request.reply.tolist()) for request in requests]


class TestInput:
    def test_token_ids(self, tmp_path):
        path = lines(tmp_path, {"prompt_ids": [1, 2], "reply_ids": [3]}, "", {"prompt_ids": [], "reply_ids": [4, 5]})
        assert as_lists(read_requests(path)) == [([1, 2], [3]), ([], [4, 5])]

    @pytest.mark.parametrize("key", ["reply", "response", "completion", "output"])
    def test_texts(self, tmp_path, key):
        path = lines(tmp_path, {"prompt": "one two", key: "three"})
        assert as_lists(read_requests(path, Words())) == [([0, 3, 3], [5])]

    def test_a_chat_gives_a_request_an_answer(self, tmp_path):
        chat = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "bb"},
            {"role": "user", "content": "ccc"},
            {"role": "assistant", "content": "dddd"},
        ]
        found = as_lists(read_requests(lines(tmp_path, {"messages": chat}), Words()))
        assert found == [
            ([6, 1, 1, 11], [2, 1]),
            ([6, 1, 1, 11, 2, 1, 6, 3, 1, 11], [4, 1]),
        ]

    def test_a_template_that_changes_earlier_turns(self, tmp_path):
        class Changing(Words):
            def apply_chat_template(self, messages, **options):
                return f"{len(messages)} " + super().apply_chat_template(messages, **options)

        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb ccc"}]
        assert as_lists(read_requests(lines(tmp_path, {"messages": chat}), Changing()))[0][1] == [2, 3]

    def test_traces(self, tmp_path):
        path = tmp_path / "traces.npz"
        np.savez(path, tok=np.arange(10, dtype=np.int32), seq=np.array([[0, 3, 5, 0], [0, 6, 6, 0], [5, 5, 10, 1]]))
        assert as_lists(read_requests(path)) == [([0, 1, 2], [3, 4]), ([], [5, 6, 7, 8, 9])]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{", "requests.jsonl:2: not valid JSON"),
            ("[1]", "requests.jsonl:2: expected an object"),
            ({"prompt": "a"}, "requests.jsonl:2: expected one of"),
            ({"prompt_ids": [1], "reply_ids": [-1]}, "requests.jsonl:2: reply_ids: .*got -1"),
            ({"prompt_ids": ["a"], "reply_ids": [1]}, "requests.jsonl:2"),
            ({"prompt_ids": [[1], [2, 3]], "reply_ids": [1]}, "requests.jsonl:2"),
            ({"prompt_ids": [2**40], "reply_ids": [1]}, "requests.jsonl:2: .*must be in"),
            ({"messages": ["hello"]}, "requests.jsonl:2: messages: item 0"),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path, row, message):
        path = lines(tmp_path, {"prompt_ids": [1], "reply_ids": [1]}, row)
        with pytest.raises(InputError, match=message):
            read_requests(path, Words())

    def test_text_needs_a_tokenizer(self, tmp_path):
        with pytest.raises(InputError, match="--tokenizer"):
            read_requests(lines(tmp_path, {"prompt": "a", "reply": "b"}))

    def test_a_template_that_refuses(self, tmp_path):
        class Refusing(Words):
            def apply_chat_template(self, *_, **__):
                raise RuntimeError("roles must alternate")

        chat = {"messages": [{"role": "assistant", "content": "a"}]}
        with pytest.raises(InputError, match="roles must alternate"):
            read_requests(lines(tmp_path, chat), Refusing())

    def test_nothing_to_replay(self, tmp_path):
        with pytest.raises(InputError, match="no request with a reply"):
            read_requests(lines(tmp_path, {"prompt_ids": [1], "reply_ids": []}))
        with pytest.raises(InputError, match=r"none\.jsonl"):
            read_requests(tmp_path / "none.jsonl")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive at all"])
    def test_files_that_are_no_traces(self, tmp_path, content):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InputError, match="not a token trace"):
            read_requests(tmp_path / "bad.npz")

    @pytest.mark.parametrize("rows", [[[0, 5, 99]], [[3, 2, 4]], [[-1, 2, 4]], [[0, 1]], [0, 1, 2]])
    def test_traces_that_point_nowhere(self, tmp_path, rows):
        np.savez(tmp_path / "bad.npz", tok=np.arange(10, dtype=np.int32), seq=np.array(rows))
        with pytest.raises(InputError, match="seq"):
            read_requests(tmp_path / "bad.npz")


class TestCosts:
    def test_linear(self):
        assert [linear(0.1)(n) for n in (1, 2, 11, 101)] == pytest.approx([1, 1.1, 2, 11])

    def test_between_and_beyond(self):
        cost = Cost("made up", {1: 1.0, 3: 2.0, 5: 2.5})
        assert [cost(n) for n in (1, 2, 3, 4, 5, 9)] == pytest.approx([1, 1.5, 2, 2.25, 2.5, 3.5])
        assert Cost("one point", {1: 2.0})(50) == 2.0

    def test_those_shipped_never_fall(self):
        for cost in (GPU, CPU):
            values = [cost(n) for n in range(1, 400)]
            assert values == sorted(values)
            assert values[0] == 1

    def test_names_and_numbers(self):
        assert read_cost("gpu") is GPU
        assert read_cost("cpu") is CPU
        assert read_cost("0.25")(3) == 1.5

    @pytest.mark.parametrize("bad", ["-1", "nan", "101", "no-such-file.json"])
    def test_bad_ones(self, bad):
        with pytest.raises(InputError, match="--cost"):
            read_cost(bad)

    def test_file_round_trip(self, tmp_path):
        write_cost(tmp_path / "mine.json", {1: 0.01, 8: 0.02}, {"model": "some"})
        cost = read_cost(str(tmp_path / "mine.json"))
        assert cost == Cost("mine", {1: 0.01, 8: 0.02})
        assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]

    @pytest.mark.parametrize(
        "content",
        ["", "[]", "{}", '{"seconds": 3}', '{"seconds": {"2": 1}}', '{"seconds": {"1": -1}}', '{"seconds": {"1": "a"}}',
         '{"seconds": {"1": 1, "0": 1}}', '{"seconds": {"1": NaN}}'],
    )  # fmt: skip
    def test_files_that_are_none(self, tmp_path, content):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=r"bad\.json"):
            read_cost(str(tmp_path / "bad.json"))


class TestSimulation:
    def test_by_hand(self):
        # Drafts 2 tokens, the second of them always wrong: a step commits 2, the last one 1.
        reply = list(range(10, 19))
        script = drafters.Scripted(lambda text, budget: [text[-1] + 1, 0][:budget])
        outcome = replay(script, requests_of(([9], reply)), linear(0.1))
        # 9 tokens: 2 + 2 + 2 + 2 + 1, the last step without a draft, for a reply's last token needs none after it.
        assert (outcome.tokens, outcome.steps, outcome.drafted, outcome.accepted) == (9, 5, 8, 4)
        assert outcome.time == pytest.approx(4 * 1.2 + 1)
        assert outcome.plain_time == 9
        assert outcome.speedup == pytest.approx(9 / 5.8)
        assert outcome.acceptance == 0.5
        assert script.closed == [[9, *reply]]

    @pytest.mark.parametrize("streams", [1, 2, 5])
    def test_every_reply_is_committed_whole(self, streams):
        source = np.random.default_rng(0)
        pairs = [(source.integers(0, 5, 6).tolist(), source.integers(0, 5, n).tolist()) for n in (1, 7, 30, 2, 11)]
        script = drafters.copying(ngram=1)
        outcome = replay(script, requests_of(*pairs), linear(0), streams=streams)
        assert sorted(script.closed) == sorted(prompt + reply for prompt, reply in pairs)
        assert outcome.tokens == sum(len(reply) for _, reply in pairs)
        assert outcome.tokens == outcome.steps + outcome.accepted
        assert max(len(call) for name, call in script.calls if name == "draft") == streams

    def test_nothing_drafted_is_plain(self):
        pairs = [([1], [2] * n) for n in (3, 9, 4)]
        for streams in (1, 2, 3):
            outcome = replay(drafters.never(), requests_of(*pairs), linear(0.3), streams=streams)
            assert outcome.speedup == pytest.approx(1)
            assert outcome.time == pytest.approx(plain_time([3, 9, 4], linear(0.3), streams))
            assert outcome.tokens_per_step == 1

    def test_all_right_is_as_fast_as_can_be(self):
        reply = list(range(50, 90))
        truth = drafters.truth([1, *reply])
        outcome = replay(truth, requests_of(([1], reply)), linear(0), longest=9)
        assert outcome.steps == 4
        assert outcome.speedup == pytest.approx(10)
        assert outcome.acceptance == 1

    def test_trees_are_followed(self):
        class Tree(drafters.Scripted):
            def draft(self, slots, budget):
                if budget[0] < 4:
                    return Drafts.empty(1)
                return Drafts(
                    np.array([7, 2, 8, 3], np.int32),
                    np.array([-1, -1, 0, 1], np.int32),
                    np.array([0.5, 0.4, 0.3, 0.2], np.float32),
                    np.array([1, 2, 1, 2], np.uint8),
                    np.array([0, 4], np.int64),
                )

        outcome = replay(Tree(), requests_of(([1], [2, 3, 4, 5, 6])), linear(0))
        assert (outcome.steps, outcome.drafted, outcome.accepted) == (3, 4, 2)
        assert outcome.as_dict()["by_source"]["responses"] == {"drafted": 2, "accepted": 2}
        assert outcome.as_dict()["by_source"]["own_text"] == {"drafted": 2, "accepted": 0}
        # Judged are 0.5 and 0.4, and half of that behind the second, which is right; behind a wrong token none is.
        assert outcome.calibration.sum(axis=0) == pytest.approx([3, 2, 1.4])

    def test_pacing_leaves_out_what_does_not_pay(self):
        reply = [3, 4] * 20
        wrong = drafters.Scripted(lambda text, budget: [99] * min(4, budget))
        paced = told_pacer(Pacer(PacingSettings()), linear(2.0))
        assert replay(wrong, requests_of(([1], reply)), linear(2.0), pacer=paced).speedup == pytest.approx(1)
        wrong = drafters.Scripted(lambda text, budget: [99] * min(4, budget))
        assert replay(wrong, requests_of(([1], reply)), linear(2.0)).speedup < 0.2

    def test_a_padded_step_is_as_wide_as_its_longest_draft(self):
        # The first sequence drafts 3 wrong tokens a step, as far as its reply goes on; the second one none.
        def propose(text, budget):
            return [0] * min(3, budget) if text[0] == 1 else []

        pairs = [([1], [5] * 5), ([2], [5] * 5)]
        outcomes = [
            replay(drafters.Scripted(propose), requests_of(*pairs), linear(0.1), streams=2, padded=padded)
            for padded in (False, True)
        ]
        drafted = [3, 3, 2, 1, 0]
        assert outcomes[0].time == pytest.approx(sum(1 + 0.1 * (2 + n - 1) for n in drafted))
        assert outcomes[1].time == pytest.approx(sum(1 + 0.1 * (2 * (1 + n) - 1) for n in drafted))
        assert outcomes[0].plain_time == outcomes[1].plain_time
        assert [(one.passes, one.steps, one.drafted) for one in outcomes] == [(5, 10, 9)] * 2

    def test_pacing_of_padded_steps_is_that_of_generate(self):
        # One sequence has a good draft of 4. Padded, the other three pay for it as well.
        def propose(text, budget):
            return [5] * min(4, budget) if text[0] == 1 else []

        pairs = [([number], [5] * 40) for number in (1, 2, 3, 4)]
        kept = {}
        for padded in (False, True):
            pacer = told_pacer(Pacer(), linear(0.4))
            script = drafters.Scripted(propose)
            kept[padded] = replay(script, requests_of(*pairs), linear(0.4), pacer=pacer, streams=4, padded=padded)
        assert kept[False].drafted > 0
        assert kept[True].drafted == 0
        assert kept[True].speedup == pytest.approx(1)

    def test_drafting_is_timed_and_no_part_of_the_speed_up(self, monkeypatch):
        clock = iter(range(1000))
        monkeypatch.setattr(simulate, "perf_counter", lambda: next(clock))
        outcome = replay(drafters.never(), requests_of(([1], [2, 3]), ([1], [2])), linear(0))
        # A second by this clock for every call that is timed: draft and extend in each of 3 steps, open twice.
        assert (outcome.passes, outcome.drafting_seconds) == (3, 6)
        assert (outcome.requests, outcome.opening_seconds) == (2, 2)
        assert outcome.as_dict()["drafting_us_per_step"] == 2e6
        assert outcome.as_dict()["opening_us_per_request"] == 1e6
        assert outcome.speedup == 1

    def test_by_match_length(self):
        outcome = replay(drafters.noise(5), requests_of(([1, 2, 3, 1, 2], [3, 1, 9, 9])), linear(0))
        matches = outcome.as_dict()["by_match_length"]
        assert sum(row["steps"] for row in matches.values()) == outcome.steps
        assert matches["2"]["steps"] == 1
        assert sum(row["drafted"] for row in matches.values()) == outcome.drafted

    def test_calibration_counts_all_that_was_drafted(self):
        # Probabilities of 0.9 a token; the first is right, the second wrong, whatever is verified.
        script = drafters.Scripted(lambda text, budget: [text[-1] + 1, 0, 0][:budget])
        paced = told_pacer(Pacer(), linear(50))
        outcome = replay(script, requests_of(([9], [10, 11, 12, 13])), linear(50), pacer=paced)
        assert outcome.drafted == 0
        # 3 steps with a draft, of 3, 2 and 1 tokens: the first of each is right, the second, where there is one, wrong.
        assert outcome.calibration.sum(axis=0) == pytest.approx([5, 3, 5 * 0.9])

    def test_what_needs_the_target_is_refused(self):
        class Needy(drafters.Scripted):
            feedback = frozenset({"argmax"})

        with pytest.raises(UnsupportedError, match="argmax"):
            replay(Needy(), requests_of(([1], [2])), linear(0))

    def test_what_was_accepted_is_told_on_request(self):
        class Curious(drafters.Scripted):
            feedback = frozenset({"accepted"})

        script = Curious(lambda text, budget: [text[-1] + 1, 0][:budget])
        replay(script, requests_of(([9], [10, 11, 12])), linear(0), streams=1)
        told = [details for name, details in script.calls if name == "observe"]
        assert [feedback.accepted.tolist() for feedback in told] == [[1], [0]]
        assert told[0].offsets.tolist() == [0, 3]

    def test_fusion_does_better_than_nothing_on_what_repeats(self):
        reply = list(range(20, 60))
        pairs = [([1, 2, 3], reply)] * 4
        fusion = make_drafter("fusion", {"memory": "8MiB"})
        outcome = replay(fusion, requests_of(*pairs), linear(0.05), pacer=told_pacer(Pacer(), linear(0.05)))
        assert outcome.speedup > 2
        assert outcome.as_dict()["by_source"]["responses"]["accepted"] > 80


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def recorded(tmp_path):
    reply = [5, 6, 7, 8] * 8
    return lines(tmp_path, *[{"prompt_ids": [1, 2, i], "reply_ids": reply} for i in range(5)])


class TestCommand:
    def test_json(self, recorded):
        options = ("--cost", "0.05", "--drafter", "fusion", "--drafter", "prompt_lookup", "--json")
        report = json.loads(run("replay", recorded, *options).output)
        assert (report["requests"], report["cost"], report["streams"]) == (5, "0.05 a token", 1)
        assert list(report["drafters"]) == ["fusion", "prompt_lookup"]
        for outcome in report["drafters"].values():
            assert outcome["tokens"] == 160
            assert outcome["speedup"] > 1.5
            assert set(outcome["by_source"]) >= {"own_text", "responses"}

    def test_table(self, recorded):
        output = run("replay", recorded, "--streams", 2, "--limit", 60).output
        assert "2 requests, 64 reply tokens, 2 at a time; cost: gpu" in output
        assert "predicted speed-up" in output
        assert re.search(r"│ fusion +│.* x │ +[\d,]+ us │", output)
        assert "own text" in output

    def test_configurations(self, recorded, tmp_path):
        (tmp_path / "short.yaml").write_text("drafter: fusion\nmax_tokens: 1\npacing: off\n")
        report = json.loads(run("replay", recorded, "--config", tmp_path / "short.yaml", "--json").output)
        assert report["drafters"]["short"]["drafted_per_step"] <= 1

    def test_plot(self, recorded, tmp_path):
        pytest.importorskip("matplotlib", reason="an optional package, which the plot is drawn with")
        run("replay", recorded, "--plot", tmp_path / "drawn.png", "--json")
        assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(InputError, match="--plot"):
            run("replay", recorded, "--plot", tmp_path / "drawn.nonsense")

    def test_padded(self, tmp_path):
        replies = [[5, 6, 7, 8] * 8, list(range(20, 52))]
        recorded = lines(tmp_path, *[{"prompt_ids": [1], "reply_ids": reply} for reply in replies])
        options = ("--cost", "0.05", "--streams", 2, "--drafter", "prompt_lookup")
        reports = [json.loads(run("replay", recorded, *options, *more, "--json").output) for more in ([], ["--padded"])]
        assert [report["padded"] for report in reports] == [False, True]
        speed = [report["drafters"]["prompt_lookup"]["speedup"] for report in reports]
        # Only the first has drafts; padded, the second pays for them too.
        assert speed[1] < speed[0]
        assert "2 at a time, padded; cost" in run("replay", recorded, *options, "--padded").output

    def test_indexes_are_handed_to_the_drafters_that_take_one(self, recorded, tmp_path):
        first = create(tmp_path / "first", [[5, 6, 7, 8] * 8])
        second = create(tmp_path / "second", [[1, 2, 3]])
        drafters_ = [f"--drafter={name}" for name in ("corpus", "fusion", "prompt_lookup")]
        output = run("replay", recorded, *drafters_, "--index", first, "--index", second, "--json").output
        report = json.loads(output)["drafters"]
        assert report["corpus"]["by_source"]["corpus"]["accepted"] > 100
        assert report["fusion"]["by_source"]["corpus"]["accepted"] > 0
        assert report["prompt_lookup"]["by_source"]["corpus"]["drafted"] == 0

    def test_a_configuration_keeps_its_own_index(self, recorded, tmp_path):
        useless = create(tmp_path / "useless", [[90, 91]])
        (tmp_path / "mine.yaml").write_text(f"drafter: corpus\nindex: {useless}\n")
        useful = create(tmp_path / "useful", [[5, 6, 7, 8] * 8])
        options = ("--drafter", "corpus", "--config", tmp_path / "mine.yaml", "--index", useful)
        report = json.loads(run("replay", recorded, *options, "--json").output)["drafters"]
        assert report["corpus"]["by_source"]["corpus"]["accepted"] > 0
        assert report["mine"]["by_source"]["corpus"]["drafted"] == 0

    def test_the_tokenizer_of_an_index_is_checked(self, recorded, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "load_tokenizer", lambda name: None)
        tokenizer = make_tokenizer(tmp_path / "tok")
        fingerprint = tokenizer_fingerprint(tokenizer / "tokenizer.json")
        mine = create(tmp_path / "mine", [[5, 6, 7, 8] * 8], fingerprint=fingerprint)
        other = create(tmp_path / "other", [[5, 6]])
        for drafter in ("corpus", "fusion"):
            options = ("--drafter", drafter, "--tokenizer", tokenizer)
            run("replay", recorded, *options, "--index", mine)
            with pytest.raises(TokenizerMismatchError, match="other: built with"):
                run("replay", recorded, *options, "--index", other)
            with pytest.raises(TokenizerMismatchError, match="other: built with"):
                run("replay", recorded, "--drafter", drafter, "--index", mine, "--index", other)

    def test_indexes_that_do_not_fit(self, recorded, tmp_path):
        with pytest.raises(InputError, match="corpus: the drafter needs an index to draft from: give --index FOLDER"):
            run("replay", recorded, "--drafter", "corpus")
        with pytest.raises(InputError, match="none of the drafters takes one: prompt_lookup"):
            run("replay", recorded, "--drafter", "prompt_lookup", "--index", tmp_path)
        with pytest.raises(NotFoundError, match="no index there"):
            run("replay", recorded, "--index", tmp_path / "none")

    def test_errors_are_ours(self, recorded, tmp_path):
        for options in (("--cost", "free"), ("--tokenizer", tmp_path / "none")):
            with pytest.raises(InputError, match=options[0]):
                run("replay", recorded, *options)


def test_measure_cost(tmp_path):
    """On a tiny random model: the file is one that replay takes, and the cache is as long as was asked for."""
    tiny = pytest.importorskip("tiny", reason="needs torch and transformers")
    tiny.model().save_pretrained(tmp_path / "model")
    options = ("--context", 40, "--max-tokens", 4, "--repeats", 2, "--out", tmp_path / "cost.json")
    output = run("measure-cost", "--model", tmp_path / "model", *options).output
    assert "after 40 tokens" in output
    content = json.loads((tmp_path / "cost.json").read_text())
    assert (content["context"], list(content["seconds"])) == (40, ["1", "2", "3", "4"])
    assert read_cost(str(tmp_path / "cost.json"))(1) > 0


def test_measure_cost_names_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="--dtype"):
        run("measure-cost", "--model", tmp_path, "--dtype", "int3")
    with pytest.raises(InputError, match="--model"):
        run("measure-cost", "--model", tmp_path / "none")
    with pytest.raises(InputError, match="--model"):
        run("measure-cost", "--model", tmp_path)
