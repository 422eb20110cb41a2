"""The proposer with vLLM's arrays, but without vLLM."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from drafters import MALFORMED, Malformed, Raising, Scripted, chain, copying

from freedraft.integrations.vllm import Proposer, metrics, plugin, proposer
from freedraft.integrations.vllm.chains import likeliest_chains
from freedraft.integrations.vllm.statistics import PeriodicLog, Statistics, describe, source_name
from freedraft.plugins.base import Drafts, Source
from freedraft.plugins.config import ENVIRONMENT_VARIABLE
from freedraft.retrieval.errors import ConfigError, UnsupportedError

ROWS, WIDTH, VOCABULARY, LONGEST = 4, 64, 1000, 5


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (ENVIRONMENT_VARIABLE, metrics.OWN_FOLDER, metrics.VLLM_FOLDER):
        monkeypatch.delenv(variable, raising=False)


def vllm_config(freedraft: Any = None, **model: Any) -> Any:
    """What the proposer reads of vLLM's configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=WIDTH, get_vocab_size=lambda: VOCABULARY, served_model_name="smol", **model
        ),
        speculative_config=SimpleNamespace(num_speculative_tokens=LONGEST),
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        parallel_config=SimpleNamespace(data_parallel_index=0),
        additional_config={} if freedraft is None else {"freedraft": freedraft},
    )


def with_drafter(monkeypatch: pytest.MonkeyPatch, drafter: Any, freedraft: Any = None) -> Proposer:
    """A proposer over this drafter; its rehearsal gets another."""
    made = iter([drafter, Scripted()])
    monkeypatch.setattr(proposer, "drafter_from_config", lambda config: next(made))
    return Proposer(vllm_config(freedraft))


class Batch:
    """Rows of text, as vLLM holds them."""

    def __init__(self, *texts: list[int]) -> None:
        self.texts = [list(text) for text in texts]
        self.tokens = np.full((ROWS, WIDTH), 999, np.int32)
        self.length = np.full(ROWS, WIDTH, np.int32)

    def commit(self, to: Proposer, *new: list[int]) -> list[list[int]]:
        for i, tokens in enumerate(new):
            self.texts[i] += tokens
            self.length[i] = len(self.texts[i])
            self.tokens[i, : self.length[i]] = self.texts[i]
        before = self.tokens.copy()
        drafts = to.propose(list(new), self.length, self.tokens, slot_mappings=None)
        np.testing.assert_array_equal(self.tokens, before)
        assert type(drafts) is list
        assert len(drafts) == len(new)
        for row, draft in zip(new, drafts, strict=True):
            assert type(draft) is list
            assert all(type(token) is int for token in draft)
            assert len(draft) <= LONGEST
            assert row or not draft
        return drafts


def test_each_row_gets_the_draft_of_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [text[-1] + 1, len(text)]))
    batch = Batch([10, 11], [20], [30, 31, 32])
    assert batch.commit(asked, [1], [2], [3]) == [[2, 3], [3, 2], [4, 4]]
    assert batch.commit(asked, [5, 6], [7], [8]) == [[7, 5], [8, 3], [9, 5]]


def test_a_row_without_new_tokens_gets_no_draft_and_its_prompt_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: [7])
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2, 3], [4, 5, 6])
    assert batch.commit(asked, [], [8]) == [[], [7]]
    assert sorted(drafter.texts.values()) == [[1, 2, 3], [4, 5, 6, 8]]
    assert batch.commit(asked, [9], []) == [[7], []]


def test_the_default_drafter_drafts_what_repeats() -> None:
    assert Proposer(vllm_config()).pacing is not None
    asked = Proposer(vllm_config({"pacing": "off"}))
    text = list(range(100, 120))
    batch = Batch(text + text[:10])
    assert batch.commit(asked, [110]) == [[111, 112, 113, 114, 115]]


def test_no_draft_is_longer_than_asked_for_or_reaches_the_end_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[int] = []

    def greedy(text: list[int], budget: int) -> list[int]:
        budgets.append(budget)
        return [1] * budget

    asked = with_drafter(monkeypatch, Scripted(greedy))
    batch = Batch([3] * (WIDTH - 10))
    lengths = [len(batch.commit(asked, [4])[0]) for _ in range(10)]
    # 55 of 64 places are taken at first; a draft of n tokens is followed by one of the target's own.
    assert lengths == [5, 5, 5, 5, 4, 3, 2, 1, 0, 0]
    assert 0 not in budgets


def test_long_prompts_are_taken_in_over_steps_and_drafted_for_after(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: [len(text)])
    asked = with_drafter(monkeypatch, drafter, {"vllm": {"step_tokens": 20}})
    batch = Batch([5] * 49, [6] * 3)
    assert batch.commit(asked, [1], [1]) == [[], [4]]
    assert batch.commit(asked, [1], [1]) == [[], [5]]
    assert batch.commit(asked, [1], [1]) == [[52], [6]]
    sizes = [len(tokens) for method, tokens in drafter.calls if method == "extend"]
    assert max(sizes) <= 20
    assert sum(sizes) == 52 + 6


def test_a_request_that_ends_is_closed_and_one_that_moves_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Scripted(lambda text, budget: text[:2])
    asked = with_drafter(monkeypatch, drafter, {"vllm": {"idle_sequences": 0}})
    batch = Batch([1, 1], [2, 2], [3, 3])
    batch.commit(asked, [4], [4], [4])
    batch.texts = [batch.texts[2], batch.texts[1]]
    assert batch.commit(asked, [5], [5]) == [[3, 3], [2, 2]]
    assert drafter.closed == [[1, 1, 4]]
    assert sorted(drafter.texts.values()) == [[2, 2, 4, 5], [3, 3, 4, 5]]


@pytest.mark.parametrize("build", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_draft_is_no_draft(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Malformed(build))
    batch = Batch([1, 2])
    assert batch.commit(asked, [3]) == [[]]
    assert asked.statistics.errors == 1


def test_a_drafter_that_raises_costs_drafts_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = Raising(Scripted(lambda text, budget: [len(text)]), 0.2, spared=("close",))
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1], [2], [3])
    with caplog.at_level(logging.ERROR, "freedraft"):
        answers = [batch.commit(asked, [4], [5], [6]) for _ in range(60)]
    for i, rows in enumerate(answers):
        assert all(draft in ([], [i + 2]) for draft in rows)
    assert sum(map(len, (draft for rows in answers for draft in rows))) > 30
    assert asked.statistics.errors == drafter.raised > 0
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_a_drafter_that_always_raises_is_asked_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Raising(Scripted(), 1.0)
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1])
    for _ in range(WIDTH - 2):
        assert batch.commit(asked, [4]) == [[]]
    assert 4 <= asked.statistics.errors <= 10


def test_a_failure_of_our_own_is_survived(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    drafter = Scripted(lambda text, budget: [len(text)])
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1, 2], [3])
    batch.commit(asked, [4], [4])
    with caplog.at_level(logging.ERROR, "freedraft"):
        assert asked.propose([[1]] * 2, "nonsense", batch.tokens) == [[], []]
        assert asked.propose([[1]] * (ROWS + 1), batch.length, batch.tokens) == [[]] * (ROWS + 1)
    assert len(caplog.records) == 1
    assert asked.statistics.errors == 2
    assert batch.commit(asked, [5], [5]) == [[4], [3]]
    assert sorted(drafter.texts.values()) == [[1, 2, 4, 5], [3, 4, 5]]


def test_drafters_that_want_it_are_told_what_was_accepted_before_the_text_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafter = Scripted(lambda text, budget: [8, 8, 8])
    drafter.feedback = frozenset({"accepted"})
    asked = with_drafter(monkeypatch, drafter)
    batch = Batch([1], [2], [3])
    batch.commit(asked, [4], [4], [])
    drafter.calls.clear()
    batch.commit(asked, [8, 8, 5], [6], [7])
    told = [details for method, details in drafter.calls if method == "observe"]
    assert [feedback.accepted.tolist() for feedback in told] == [[2, 0]]
    assert told[0].offsets.tolist() == [0, 4, 8]
    assert [method for method, _ in drafter.calls] == ["observe", "extend", "draft"]


def test_a_drafter_that_wants_what_this_vllm_does_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SimpleNamespace(GPUModelRunner=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", runner)
    drafter = Scripted()
    drafter.feedback = frozenset({"accepted", "argmax"})
    with pytest.raises(UnsupportedError, match="needs the target's argmax"):
        with_drafter(monkeypatch, drafter)


@pytest.mark.parametrize("attribute", ["is_hybrid", "is_attention_free"])
def test_models_with_recurrent_layers_are_refused_with_the_issue(attribute: str) -> None:
    with pytest.raises(UnsupportedError, match="39273"):
        Proposer(vllm_config(**{attribute: True}))


def test_other_tensor_parallel_ranks_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposer, "_tensor_parallel_rank", lambda: 1)
    monkeypatch.setattr(proposer, "drafter_from_config", lambda config: pytest.fail("no drafter is needed"))
    asked = Proposer(vllm_config())
    assert Batch([1, 1, 1, 1]).commit(asked, [1]) == [[]]
    assert asked.statistics.steps == 0


def test_loading_a_model_is_no_work() -> None:
    assert Proposer(vllm_config()).load_model("anything", more=1) is None


def test_the_name_that_users_write_is_found_and_no_other() -> None:
    import freedraft.integrations.vllm as package

    assert package.Proposer is proposer.Proposer
    with pytest.raises(AttributeError, match="Propeller"):
        _ = package.Propeller


# Configuration


def test_options_come_from_additional_config_a_file_or_the_environment(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("drafter: prompt_lookup\nmax_tokens: 3\nvllm:\n  step_tokens: 77\n")
    flat = {"drafter": "prompt_lookup", "max_tokens": 3, "vllm": {"step_tokens": 77}}
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(file))
    from_environment = Proposer(vllm_config())
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, json.dumps(flat))
    from_json = Proposer(vllm_config())
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "/nowhere.yaml")
    from_mapping = Proposer(vllm_config(flat))
    from_file = Proposer(vllm_config({"config": str(file)}))
    for asked in (from_environment, from_json, from_mapping, from_file):
        assert asked.settings.step_tokens == 77
        assert Batch(list(range(9)) * 2).commit(asked, [0]) == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "sufix_automaton"}, "did you mean suffix_automaton"),
        ({"max_token": 3}, "did you mean max_tokens"),
        ({"vllm": {"step_token": 3}}, "vllm: step_token: unknown setting; did you mean step_tokens"),
        ({"vllm": {"step_tokens": 0}}, "vllm: step_tokens: .*greater than or equal to 1"),
        ({"vllm": {"log_interval": "often"}}, "vllm: log_interval"),
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml"),
        ("suffix_automaton", "expected a mapping"),
    ],
)
def test_bad_options_are_refused_with_the_path_to_them(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Proposer(vllm_config(options))


# Kernels


def test_kernels_are_compiled_before_the_first_request(caplog: pytest.LogCaptureFixture) -> None:
    from freedraft.integrations.vllm import chains, ledger, matching

    with caplog.at_level(logging.INFO, "freedraft"):
        asked = Proposer(vllm_config())
    assert "drafter fusion, up to 5 tokens a step; kernels ready in" in caplog.text
    kernels = [
        getattr(module, name)
        for module in (chains, ledger, matching)
        for name in vars(module)
        if hasattr(getattr(module, name), "signatures")
    ]
    compiled = {kernel: len(kernel.signatures) for kernel in kernels}
    batch = Batch([1, 2, 3, 4, 1, 2], [5, 5, 5], [7])
    batch.commit(asked, [3], [5, 5], [])
    batch.commit(asked, [4, 1], [5], [8])
    batch.texts = [batch.texts[1]]
    batch.commit(asked, [5])
    assert {kernel: len(kernel.signatures) for kernel in kernels} == compiled
    assert asked.statistics.errors == 0
    assert asked.statistics.steps == 3


def test_a_chain_passes_through_unchanged_and_a_tree_gives_its_likeliest_branch() -> None:
    tree = Drafts(
        np.array([10, 11, 12, 13, 14, 20, 21, 30], np.int32),
        np.array([-1, 0, -1, 2, 2, -1, 0, -1], np.int32),
        np.array([0.4, 0.39, 0.5, 0.1, 0.2, 0.9, 0.8, 0.3], np.float32),
        np.array([0, 0, 1, 0, 1, 2, 3, 4], np.uint8),
        np.array([0, 5, 5, 7, 8], np.int64),
    )
    chains, nodes = likeliest_chains(tree)
    assert nodes.tolist() == [2, 4, 0, 1, 0]
    assert chains.tokens.tolist() == [12, 14, 20, 21, 30]
    assert chains.parents.tolist() == [-1, 0, -1, 0, -1]
    assert chains.probability.tolist() == pytest.approx([0.5, 0.2, 0.9, 0.8, 0.3])
    assert chains.source.tolist() == [1, 1, 2, 3, 4]
    assert chains.offsets.tolist() == [0, 2, 2, 4, 5]
    straight = chain(list(range(40)))
    chains, nodes = likeliest_chains(straight)
    assert nodes.tolist() == list(range(40))
    assert chains.tokens.tolist() == list(range(40))
    assert chains.parents.tolist() == list(range(-1, 39))
    assert chains.offsets.tolist() == [0, 40]
    assert likeliest_chains(Drafts.empty(3))[0].rows == 3


# Statistics


def test_statistics_count_all_steps_and_what_was_accepted_by_source(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [8, 8] if text[0] == 1 else []))
    batch = Batch([1], [2], [3])
    batch.commit(asked, [4], [4], [])
    batch.commit(asked, [8, 5], [6], [])
    batch.commit(asked, [8, 8, 5], [6], [7])
    seen = asked.statistics
    assert (seen.steps, seen.sequence_steps, seen.tokens, seen.sequences) == (3, 7, 10, 3)
    assert (seen.taken, seen.opened) == (13, 3)
    assert seen.drafted[Source.OTHER] == 6
    assert seen.accepted[Source.OTHER] == 3
    assert seen.drafted.sum() == 6
    assert seen.seconds > 0


def test_nothing_is_counted_as_accepted_when_a_call_was_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [8, 8]))
    batch = Batch([1])
    batch.commit(asked, [4])
    batch.texts[0] += [8, 9]
    batch.commit(asked, [5, 5, 5])
    assert asked.statistics.accepted.sum() == 0


def test_the_line_tells_the_interval_and_the_errors_of_all_time() -> None:
    before = Statistics(steps=10, sequence_steps=20, tokens=30, seconds=1.0, errors=1)
    now = Statistics(sequences=4, steps=20, sequence_steps=60, tokens=90, seconds=1.005, errors=2)
    now.drafted[1], now.accepted[1] = 50, 20
    assert describe(now, before) == (
        "freedraft: Sequences: 4, Tokens per step: 1.50, Drafted: 50 tokens, Accepted: 20 tokens (40.0%), "
        "Drafting: 500 us per engine step, Errors: 2"
    )
    assert "nan" in describe(before, before)


def test_the_line_is_written_at_the_interval_while_something_happens(caplog: pytest.LogCaptureFixture) -> None:
    statistics = Statistics()
    written = threading.Event()
    watcher = logging.Handler()
    watcher.emit = lambda record: written.set()  # type: ignore[method-assign]
    logging.getLogger("freedraft").addHandler(watcher)
    with caplog.at_level(logging.INFO, "freedraft"):
        log = PeriodicLog(statistics, 0.01)
        statistics.steps += 1
        assert written.wait(30)
        log.end()
        log.write()
        assert len([record for record in caplog.records if "Tokens per step" in record.message]) == 1
        statistics.steps += 1
        log.write()
        assert len([record for record in caplog.records if "Tokens per step" in record.message]) == 2
    logging.getLogger("freedraft").removeHandler(watcher)


def test_sources_have_names() -> None:
    assert source_name(int(Source.OWN_TEXT)) == "own_text"
    assert source_name(200) == "200"


# Metrics


def scraped(registry: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for metric in registry.collect()
        for sample in metric.samples
    }


def test_metrics_reach_the_process_that_serves_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path / "metrics"))
    collector = metrics.Collector()
    assert list(collector.collect()) == []
    asked = with_drafter(monkeypatch, copying(ngram=1))
    other = with_drafter(monkeypatch, copying(ngram=1))
    Batch([1, 2, 1]).commit(asked, [2])
    Batch([1, 2, 1], [5]).commit(other, [2], [6])
    seen = scraped(collector)
    labels = (("engine", "0"), ("model_name", "smol"))
    assert seen["freedraft:steps_total", labels] == 2
    assert seen["freedraft:sequence_steps_total", labels] == 3
    assert seen["freedraft:tokens_total", labels] == 3
    assert seen["freedraft:sequences", labels] == 3
    assert seen["freedraft:errors_total", labels] == 0
    assert seen["freedraft:draft_tokens_total", (*labels, ("source", "other"))] == 4
    assert seen["freedraft:draft_seconds_total", labels] > 0


def test_with_several_api_servers_vllms_own_folder_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from prometheus_client import CollectorRegistry, multiprocess

    monkeypatch.setenv(metrics.VLLM_FOLDER, str(tmp_path))
    Batch([1, 2, 1]).commit(with_drafter(monkeypatch, copying()), [2])
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    assert scraped(registry)["freedraft:steps_total", (("engine", "0"), ("model_name", "smol"))] == 1


def test_a_folder_that_can_not_be_written_costs_the_metrics_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "freedraft"):
        asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [9]))
    assert "can't write" in caplog.text
    assert Batch([1]).commit(asked, [2]) == [[9]]


def test_the_plug_in_registers_once_and_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    plugin.register()
    plugin.register()
    assert len(list(registry._collector_to_names)) == 1
    monkeypatch.delenv(metrics.OWN_FOLDER)
    monkeypatch.setattr(prometheus_client, "REGISTRY", None)
    with caplog.at_level(logging.WARNING, "freedraft"):
        plugin.register()
    assert "no metrics on /metrics" in caplog.text


def test_a_server_started_by_a_program_that_uses_vllm_serves_its_own_metrics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import multiprocessing

    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path))
    with monkeypatch.context() as worker:
        worker.setattr(multiprocessing, "parent_process", lambda: "the server")
        metrics.serve()
        assert os.environ[metrics.OWN_FOLDER] == str(tmp_path)
        assert not registry._collector_to_names
    metrics.serve()
    assert os.environ[metrics.OWN_FOLDER] != str(tmp_path)
    assert len(registry._collector_to_names) == 1


def test_sampling_on_a_cpu_is_mended() -> None:
    """`integrations.vllm.workarounds` says what vLLM (0.32) gets wrong there."""
    import torch
    from vllm.v1.sample import rejection_sampler

    Proposer(vllm_config())
    Proposer(vllm_config())
    k = torch.tensor([2], dtype=torch.int32)
    assert rejection_sampler.apply_top_k_top_p(torch.empty(0, 9), k[:0], None).shape == (0, 9)
    filtered = rejection_sampler.apply_top_k_top_p(torch.arange(9.0)[None], k, None)
    assert filtered.isfinite().sum() == 2
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    expand = rejection_sampler.expand_batch_to_tokens
    for values in (torch.tensor([0.5, 0.0, -1.0]), torch.tensor([3, 0, 7], dtype=torch.int32)):
        expected = values[[0, 0, 2, 2, 2]]
        assert expand(values, ends, 5).equal(expected)
        assert expand(values, ends, 5, replace_from=values[2].item(), replace_to=1).equal(
            torch.where(expected == values[2], torch.ones_like(expected), expected)
        )
        assert expand(values[:0], ends[:0], 0).shape == (0,)
