"""Building on a Ray cluster: the same segments as on one machine, though a worker is killed half-way."""

from __future__ import annotations

import json
import os
import random
import signal

import pytest
from tiny_tokenizer import WORDS, make_tokenizer

from freedraft.retrieval.build import builder, executors
from freedraft.retrieval.build.builder import BuildOptions, build_index
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.errors import CapacityError, InputError
from freedraft.retrieval.index.errors import MissingPackageError
from freedraft.retrieval.index.store import CorpusIndex

ray = pytest.importorskip("ray", reason="the `index` extra is not installed")


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20, "memory": 2 << 30},
    )
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    source = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    texts = [" ".join(source.choice(WORDS) for _ in range(source.randrange(1, 30))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(builder, "segment_tokens", lambda *_: 400)


def segment_bytes(folder):
    return [segment.path.read_bytes() for segment in CorpusIndex(folder).segments]


def test_a_worker_killed_half_way_changes_nothing(address, tokenizer, corpus, tmp_path, small_segments, monkeypatch):
    build_index(tmp_path / "here", [corpus], tokenizer)
    real = executors.build_apart
    killed = tmp_path / "killed"

    def killed_once(name, documents, min_count):
        result = real(name, documents, min_count)
        try:
            # The first to make the file is the one that dies, with its segment built and not handed over.
            os.close(os.open(killed, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return result
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    monkeypatch.setattr(executors, "build_apart", killed_once)
    report = build_index(tmp_path / "there", [corpus], tokenizer, options=BuildOptions(ray=address))
    assert killed.exists()
    assert report.segments > 2
    assert segment_bytes(tmp_path / "there") == segment_bytes(tmp_path / "here")
    CorpusIndex(tmp_path / "there").verify()
    assert not ray.is_initialized()


def test_a_worker_that_always_dies_ends_the_build_and_leaves_the_old_index(
    address, tokenizer, corpus, tmp_path, small_segments, monkeypatch
):
    build_index(tmp_path / "i", [corpus], tokenizer)
    before, files = segment_bytes(tmp_path / "i"), sorted((tmp_path / "i").iterdir())

    def always_killed(name, documents, min_count):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(executors, "build_apart", always_killed)
    monkeypatch.setattr(executors, "RAY_RETRIES", 1)
    with pytest.raises(CapacityError, match="tried 2 times"):
        build_index(tmp_path / "i", [corpus], tokenizer, options=BuildOptions(ray=address), overwrite=True)
    assert segment_bytes(tmp_path / "i") == before
    assert sorted((tmp_path / "i").iterdir()) == files
    assert not ray.is_initialized()


def test_more_memory_than_any_node_has(address, tokenizer, corpus, tmp_path):
    with pytest.raises(InputError, match="largest node of the cluster offers 2048 MiB"):
        build_index(tmp_path / "i", [corpus], tokenizer, options=BuildOptions(ray=address, max_memory=8 << 30))


def test_no_cluster_there(tokenizer, corpus, tmp_path, monkeypatch):
    def nobody(*args, **kwargs):
        raise ConnectionError("Could not find any running Ray instance\nmore")

    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(
        InputError, match=r"--ray auto: no cluster answers there: Could not find any running Ray instance$"
    ):
        build_index(tmp_path / "i", [corpus], tokenizer, options=BuildOptions(ray="auto"))


def test_without_ray_the_extra_is_named(tokenizer, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"freedraft\[index\]"):
        build_index(tmp_path / "i", [corpus], tokenizer, options=BuildOptions(ray="auto"))
