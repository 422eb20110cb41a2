"""Fixtures and settings of the whole suite."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from numba.core import config as numba_config

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.setdefault("FREEDRAFT_CACHE", str(ROOT / ".cache")))


def _kernel_sources() -> str:
    files = sorted(path for floor in ("retrieval", "plugins", "integrations") for path in (ROOT / floor).rglob("*.py"))
    sources = [source for path in files if b"kernel" in (source := path.read_bytes())]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


# Numba looks only at a kernel's own file when it asks whether its cache is stale, not at the kernels that it calls.
os.environ.setdefault("NUMBA_CACHE_DIR", str(CACHE / "numba" / _kernel_sources()))
# The warning filter in pyproject has imported numba already, which has read its settings.
numba_config.reload_config()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

settings.register_profile(
    "freedraft", deadline=None, derandomize=bool(os.environ.get("CI")), suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("freedraft")

# What takes longest begins first, so that the processes of `make test` end together. The first two do not compile the
# same kernels at once.
LONGEST = (
    "vllm_engine",
    "demo",
    "hf_trees",
    "mixing",
    "vllm_server",
    "corpus_end_to_end",
    "vllm_tracker",
    "capture",
    "vllm_drafting",
    "cuda_bench",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted once and kept in the cache."""
    from freedraft.integrations.hf.smollm2 import demo_model_path

    return demo_model_path()


@pytest.fixture(scope="session")
def model(model_path):
    """SmolLM2-135M-Instruct in float32 on the CPU, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer(model_path):
    """Its tokenizer, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)
