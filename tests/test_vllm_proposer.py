"""The proposer with vLLM's arrays, but without vLLM."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from drafters import Scripted, copying
from vllm_stand_in import OUTSIDE, Batch, vllm_config, with_drafter

from freedraft.integrations.vllm import Proposer, metrics, plugin, proposer
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
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml"),
        ("suffix_automaton", "expected a mapping"),
    ],
)
def test_bad_options_are_refused_with_the_path_to_them(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Proposer(vllm_config(options))


# Kernels


COMPILED_LATE = """
import sys
from unittest import mock

import numba
from numba.core.dispatcher import Dispatcher
from vllm_stand_in import Batch, vllm_config

from freedraft.integrations.vllm import tap
from freedraft.integrations.vllm.proposer import Proposer

def signatures():
    modules = [module for name, module in sys.modules.items() if name.startswith("freedraft.")]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)}
    return {f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}": len(kernel.signatures) for kernel in found}

options = {options}
with mock.patch.object(tap, "LogitsTap", tap.MadeUpRankings), mock.patch("{proposer}.LogitsTap", tap.MadeUpRankings):
    asked = Proposer(vllm_config(options))
ready = signatures()
batch = Batch([1, 2, 3, 4, 1, 2], [5, 5, 5], [7])
for step in range(30):
    batch.commit(asked, [3 + step % 4], [5, 5] if step % 7 == 0 else [5], [] if step < 3 else [step % 4])
batch.texts[0] += [9, 9, 8]
batch.commit(asked, [5], [6], [7])
batch.texts = batch.texts[:1]
for _ in range(12):
    batch.commit(asked, [1])
assert asked.statistics.errors == 0
print(sorted(name for name, count in signatures().items() if count != ready.get(name, 0)))
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pacing": "off"},
        {"drafter": "suffix_automaton"},
        {"drafter": "prompt_lookup", "pacing": "on"},
        {"recycling": True},
        {"drafters": {"jacobi": {}, "lookahead": {}}},
        {"drafter": "token_recycling"},
    ],
    ids=str,
)
def test_kernels_are_compiled_before_the_first_request(options: Any) -> None:
    """In a process of its own: in this one, other tests have compiled them."""
    code = COMPILED_LATE.replace("{options}", repr(options)).replace("{proposer}", proposer.__name__)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


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
    labels = (("engine", "0"), ("model_name", "smol"))
    asked = with_drafter(monkeypatch, copying(ngram=1))
    other = with_drafter(monkeypatch, copying(ngram=1))
    assert scraped(collector)["freedraft:steps_total", labels] == 0
    Batch([1, 2, 1]).commit(asked, [2])
    Batch([1, 2, 1], [5]).commit(other, [2], [6])
    seen = scraped(collector)
    assert seen["freedraft:steps_total", labels] == 2
    assert seen["freedraft:sequence_steps_total", labels] == 3
    assert seen["freedraft:tokens_total", labels] == 3
    assert seen["freedraft:sequences", labels] == 3
    assert seen["freedraft:errors_total", labels] == 0
    assert seen["freedraft:draft_tokens_total", (*labels, ("source", "other"))] == 4
    assert seen["freedraft:draft_seconds_total", labels] > 0


def test_a_damaged_file_costs_our_metrics_and_not_vllms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from prometheus_client import CollectorRegistry, Counter, generate_latest

    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path))
    (tmp_path / "counter_1-freedraft0.db").write_bytes(b"")
    registry = CollectorRegistry()
    Counter("vllms_own", "Something.", registry=registry).inc()
    registry.register(metrics.Collector())
    with caplog.at_level(logging.WARNING, "freedraft"):
        for _ in range(2):
            assert "vllms_own_total 1.0" in generate_latest(registry).decode()
    assert len(caplog.records) == 1


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
