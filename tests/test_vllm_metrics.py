"""The proposer's metrics, from the worker that writes them to the process that serves them, without vLLM."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from drafters import Scripted, copying
from vllm_stand_in import OUTSIDE, Batch, metrics_written, with_drafter

from freedraft.integrations.vllm import metrics, plugin


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in OUTSIDE:
        monkeypatch.delenv(variable, raising=False)


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
    metrics_written(asked)
    metrics_written(other)
    seen = scraped(collector)
    assert seen["freedraft:steps_total", labels] == 2
    assert seen["freedraft:sequence_steps_total", labels] == 3
    assert seen["freedraft:tokens_total", labels] == 3
    assert seen["freedraft:sequences", labels] == 3
    assert seen["freedraft:errors_total", labels] == 0
    assert seen["freedraft:draft_tokens_total", (*labels, ("source", "other"))] == 4
    assert seen["freedraft:draft_seconds_total", labels] > 0


def test_the_last_metrics_are_written_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path / "metrics"))
    monkeypatch.setattr(metrics.PeriodicMetrics, "INTERVAL", 1e6)
    asked = with_drafter(monkeypatch, copying(ngram=1))
    Batch([1, 2, 1]).commit(asked, [2])
    labels = (("engine", "0"), ("model_name", "smol"))
    assert scraped(metrics.Collector())["freedraft:steps_total", labels] == 0
    del asked
    gc.collect()
    assert scraped(metrics.Collector())["freedraft:steps_total", labels] == 1
    assert scraped(metrics.Collector())["freedraft:sequences", labels] == 0


def test_a_child_of_multiprocessing_writes_the_last_metrics_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """As vLLM's engine is one; such a child runs nothing that `atexit` knows."""
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path / "metrics"))
    monkeypatch.setattr(metrics.PeriodicMetrics, "INTERVAL", 1e6)

    def work() -> None:
        kept.append(with_drafter(monkeypatch, copying(ngram=1)))
        Batch([1, 2, 1]).commit(kept[0], [2])

    kept: list[Any] = []
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode == 0
    labels = (("engine", "0"), ("model_name", "smol"))
    assert scraped(metrics.Collector())["freedraft:steps_total", labels] == 1


def test_metrics_that_fail_cost_no_step_and_are_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path / "metrics"))
    monkeypatch.setattr(metrics.PeriodicMetrics, "INTERVAL", 0.01)
    write = metrics.MetricsFile.write
    written: list[str] = []
    failed = threading.Event()

    def fail_behind_the_first(self: Any, *told: Any) -> None:
        written.append(threading.current_thread().name)
        if len(written) > 1:
            failed.set()
            raise OSError("no space left")
        write(self, *told)

    monkeypatch.setattr(metrics.MetricsFile, "write", fail_behind_the_first)
    with caplog.at_level(logging.WARNING, "freedraft"):
        asked = with_drafter(monkeypatch, Scripted(lambda text, budget: [9]))
        batch = Batch([1])
        assert batch.commit(asked, [2]) == [[9]]
        assert failed.wait(30)
        assert batch.commit(asked, [3]) == [[9]]
        assert asked._metrics is not None
        asked._metrics.end()
    assert written == ["MainThread", "freedraft-metrics"]
    assert caplog.text.count("no metrics from now on") == 1


def test_metrics_that_are_ended_in_their_own_thread_are_written_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The garbage collector may come across a proposer in whatever thread, in the midst of a write."""
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path / "metrics"))
    monkeypatch.setattr(metrics.PeriodicMetrics, "INTERVAL", 0.01)
    write = metrics.MetricsFile.write
    ending: list[Any] = []

    def end_too(self: Any, *told: Any) -> None:
        if threading.current_thread().name == "freedraft-metrics" and ending:
            ending.pop().end()
        write(self, *told)

    monkeypatch.setattr(metrics.MetricsFile, "write", end_too)
    asked = with_drafter(monkeypatch, copying(ngram=1))
    assert asked._metrics is not None
    ending.append(asked._metrics)
    Batch([1, 2, 1]).commit(asked, [2])
    thread = asked._metrics._writing._thread
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()
    labels = (("engine", "0"), ("model_name", "smol"))
    assert scraped(metrics.Collector())["freedraft:steps_total", labels] == 1
    assert scraped(metrics.Collector())["freedraft:sequences", labels] == 0


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
    asked = with_drafter(monkeypatch, copying())
    Batch([1, 2, 1]).commit(asked, [2])
    metrics_written(asked)
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


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prometheus' own registry, for this test an empty one."""
    from prometheus_client import CollectorRegistry

    empty = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", empty)
    return empty


def test_the_plug_in_registers_once_and_never_raises(
    monkeypatch: pytest.MonkeyPatch, registry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.register()
    plugin.register()
    assert len(list(registry._collector_to_names)) == 1
    monkeypatch.delenv(metrics.OWN_FOLDER)
    monkeypatch.setattr("prometheus_client.REGISTRY", None)
    with caplog.at_level(logging.WARNING, "freedraft"):
        plugin.register()
    assert "no metrics on /metrics" in caplog.text


def test_a_server_started_by_a_program_that_uses_vllm_serves_its_own_metrics(
    monkeypatch: pytest.MonkeyPatch, registry: Any, tmp_path: Any
) -> None:
    monkeypatch.setenv(metrics.OWN_FOLDER, str(tmp_path))
    with monkeypatch.context() as worker:
        worker.setattr(multiprocessing, "parent_process", lambda: "the server")
        metrics.serve()
        assert os.environ[metrics.OWN_FOLDER] == str(tmp_path)
        assert not registry._collector_to_names
    metrics.serve()
    assert os.environ[metrics.OWN_FOLDER] != str(tmp_path)
    assert len(registry._collector_to_names) == 1


def test_where_vllm_has_a_folder_for_all_metrics_nothing_is_registered(
    monkeypatch: pytest.MonkeyPatch, registry: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv(metrics.VLLM_FOLDER, str(tmp_path))
    metrics.serve()
    assert not registry._collector_to_names
    assert metrics.OWN_FOLDER not in os.environ
    monkeypatch.delenv(metrics.VLLM_FOLDER)
    metrics.serve()
    assert len(registry._collector_to_names) == 1
