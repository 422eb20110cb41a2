"""An index over a package's own sources, named in the configuration of either runtime: same text, fewer steps."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import rich.columns
import tiny
import yaml
from vllm_runs import assert_same, engine, prompt, statistics

from freedraft.integrations.hf import Speculative
from freedraft.retrieval.build.builder import build_index
from freedraft.retrieval.build.sources import SourceOptions
from freedraft.retrieval.build.tokenize import Tokenizer
from freedraft.retrieval.index.errors import TokenizerMismatchError

pytestmark = pytest.mark.model
one_thread = tiny.one_thread

FUNCTION = inspect.getsource(rich.columns.Columns.add_renderable)
TEXT = prompt(f"Repeat this function.\n```python\n{FUNCTION}```")
TOKENS = 50


@pytest.fixture(scope="module")
def options(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file that names an index of rich's sources."""
    folder = tmp_path_factory.mktemp("corpus")
    # A copy: git ignores what is installed in an environment, and so does the index builder.
    shutil.copytree(Path(rich.columns.__file__).parent, folder / "rich")
    build_index(folder / "rich.index", [folder / "rich"], Tokenizer(model_path), SourceOptions(include=("*.py",)))
    config = {"drafter": "corpus", "index": str(folder / "rich.index"), "tokenizer": str(model_path), "min_expected": 0}
    (folder / "options.yaml").write_text(yaml.safe_dump(config))
    return folder / "options.yaml"


@pytest.fixture(scope="module")
def plain(model: Any, tokenizer: Any) -> Any:
    """The text as `generate` gives it without drafts."""
    return tiny.plain(model, None, **tokenizer(TEXT, return_tensors="pt"), max_new_tokens=TOKENS)


def test_generate(model: Any, tokenizer: Any, plain: Any, options: Path) -> None:
    inputs = tokenizer(TEXT, return_tensors="pt")
    ours = Speculative(config=options)
    assert tiny.speculative(model, None, ours, **inputs, max_new_tokens=TOKENS).equal(plain)
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.tokens_per_step > 1.2


def test_fusion_draws_on_the_index_too(model: Any, tokenizer: Any, plain: Any, options: Path) -> None:
    given = yaml.safe_load(options.read_text())
    inputs = tokenizer(TEXT, return_tensors="pt")
    ours = Speculative("fusion", pacing="off", index=given["index"], tokenizer=None)
    assert tiny.speculative(model, None, ours, **inputs, max_new_tokens=TOKENS).equal(plain)
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.tokens_per_step > 1.2


@pytest.mark.vllm
def test_vllm(model_path: Path, options: Path) -> None:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=2)
    with engine(model_path, drafting=False) as llm:
        expected = llm.generate([TEXT], greedy, use_tqdm=False)[0].outputs[0]
    before = statistics()
    with engine(model_path, freedraft={"config": str(options)}) as llm:
        reply = llm.generate([TEXT], greedy, use_tqdm=False)[0].outputs[0]
    now = statistics()
    assert_same(list(reply.token_ids), expected)
    tokens, steps, errors = (now[name] - before.get(name, 0) for name in ("tokens", "sequence_steps", "errors"))
    assert errors == 0
    assert tokens / steps > 1.2


def test_another_models_index_is_refused(options: Path, tmp_path: Path) -> None:
    from tiny_tokenizer import make_tokenizer

    given = yaml.safe_load(options.read_text())
    other = make_tokenizer(tmp_path / "tokenizer")
    for drafter in ("corpus", "fusion"):
        with pytest.raises(TokenizerMismatchError, match=r"rich\.index.*the model has"):
            Speculative(config={"drafter": drafter, "index": given["index"], "tokenizer": str(other)})
