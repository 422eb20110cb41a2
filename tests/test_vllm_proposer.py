"""The proposer with vLLM's arrays, but without vLLM."""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from drafters import Scripted
from vllm_stand_in import OUTSIDE, Batch, vllm_config, with_drafter

from freedraft.integrations.vllm import Proposer, proposer
from freedraft.integrations.vllm.statistics import PeriodicLog, Statistics, describe, source_name
from freedraft.plugins.base import Source
from freedraft.plugins.config import ENVIRONMENT_VARIABLE
from freedraft.retrieval.errors import ConfigError, UnsupportedError


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)


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


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 2}, "different batches"),
        ({"pipeline_parallel_size": 2}, "batches in turns"),
    ],
    ids=["ranks that schedule by themselves", "pipeline"],
)
def test_parallelism_under_which_drafts_diverge_or_get_lost_is_refused(sizes: dict[str, Any], reason: str) -> None:
    from vllm.config import ParallelConfig

    assert {*sizes} <= {field.name for field in fields(ParallelConfig)}
    with pytest.raises(UnsupportedError, match=reason):
        Proposer(vllm_config_of(sizes))


@pytest.mark.parametrize(
    "sizes",
    [
        {"distributed_executor_backend": "mp", "tensor_parallel_size": 2},
        {"distributed_executor_backend": "external_launcher"},
    ],
    ids=["ranks with one scheduler", "one rank"],
)
def test_other_parallelism_is_not_refused(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any]) -> None:
    monkeypatch.setattr(proposer, "drafter_from_config", lambda config, rehearsing=False: Scripted())
    assert Batch([1]).commit(Proposer(vllm_config_of(sizes)), [2]) == [[]]


def vllm_config_of(sizes: dict[str, Any]) -> Any:
    config = vllm_config()
    vars(config.parallel_config).update(sizes)
    return config


def test_other_tensor_parallel_ranks_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposer, "_tensor_parallel_rank", lambda: 1)
    monkeypatch.setattr(
        proposer, "drafter_from_config", lambda config, rehearsing=False: pytest.fail("no drafter is needed")
    )
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
        # Of others' sections too: one file serves all.
        ({"gpu": {"max_matches": 3}}, "gpu: max_matches: unknown setting; did you mean max_match"),
        ({"generate": {"max_draft": -1}}, "generate: max_draft: .*greater than or equal to 0"),
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml"),
        ("suffix_automaton", "expected a mapping"),
    ],
)
def test_bad_options_are_refused_with_the_path_to_them(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Proposer(vllm_config(options))


# Rehearsal


def test_a_batch_of_one_short_row_is_rehearsed_for_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rehearsed = Scripted(lambda text, budget: text[:budget])
    made = iter([Scripted(), rehearsed])
    monkeypatch.setattr(proposer, "drafter_from_config", lambda config, rehearsing=False: next(made))
    config = vllm_config()
    config.scheduler_config.max_num_seqs = 1
    config.model_config.max_model_len = 8
    with caplog.at_level(logging.WARNING, "freedraft"):
        Proposer(config)
    assert not caplog.records
    assert "draft" in [method for method, _ in rehearsed.calls]


def test_the_drafter_of_the_rehearsal_is_told_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def make(config: Any, rehearsing: bool) -> Scripted:
        told.append(rehearsing)
        return Scripted()

    monkeypatch.setattr(proposer, "drafter_from_config", make)
    Proposer(vllm_config())
    assert told == [False, True]


def test_the_start_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "freedraft"):
        Proposer(vllm_config())
    assert "drafter fusion, up to 5 tokens a step; kernels ready in" in caplog.text


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
    idle = describe(before, before)
    assert "Tokens per step: -, " in idle
    assert "(-)" in idle


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
