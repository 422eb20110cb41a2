"""`freedraft demo`: on a tiny model through the whole command, and on the real one for what it promises."""

from __future__ import annotations

import json

import pytest
import tiny
from typer.testing import CliRunner

from freedraft.integrations import cli
from freedraft.integrations.demo.command import SHIPPED
from freedraft.integrations.demo.measure import PLAIN, forward_passes, greedy, measure
from freedraft.integrations.hf import Speculative
from freedraft.retrieval.errors import ConfigError, InputError

one_thread = tiny.one_thread
FIELDS = {"input", "method", "tokens", "tokens_per_second", "tokens_per_step", "identical"}


def run(*arguments):
    return CliRunner().invoke(cli.app, ["demo", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a random model and a tokenizer of its own, without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    model = tiny.model()
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "question.txt"
    path.write_text("w1 w2 w3 w4 w1 w2 w3 w4 w1 w2")
    return path


def test_json_on_a_model_and_a_prompt_of_ones_own(tiny_model, prompt):
    options = ("--model", tiny_model, "--prompt", prompt, "--max-new-tokens", 12, "--repeats", 1)
    printed = json.loads(run(*options, "--json", "--drafter", "prompt_lookup").stdout)
    assert [one["method"] for one in printed] == [PLAIN, "transformers prompt lookup", "freedraft prompt_lookup"]
    for one in printed:
        assert set(one) >= FIELDS
        assert one["input"] == str(prompt)
        assert one["tokens"] == 12
        assert one["identical"] is True
        assert one["tokens_per_second"] > 0
    assert printed[0]["tokens_per_step"] == 1
    assert printed[2]["tokens_per_step"] >= 1


def test_a_table_with_a_configuration_file(tiny_model, prompt, tmp_path, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    config = tmp_path / "freedraft.yaml"
    config.write_text("drafter: prompt_lookup\nmax_tokens: 3\n")
    options = ("--model", tiny_model, "--prompt", prompt, "--max-new-tokens", 8, "--repeats", 1)
    result = run(*options, "--config", config, "--show-text")
    assert result.exit_code == 0
    # Where there is no terminal to draw a bar on, long work is told in lines.
    told = [line.split(": ")[1] for line in result.stderr.splitlines() if line.startswith("freedraft demo: ")]
    assert told == ["loading the model", "compiling the kernels", str(prompt)]
    assert "identical" in result.output
    assert "differs" not in result.output
    assert "the same text as plain decoding" in result.output


def test_bad_arguments(tiny_model, prompt, tmp_path):
    missing = tmp_path / "missing.txt"
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    typo = tmp_path / "typo.yaml"
    typo.write_text("drafter: prompt_lookup\nmax_token: 3\n")
    for error, words, options in (
        (InputError, "missing.txt", ("--prompt", missing)),
        (InputError, "is empty", ("--prompt", empty)),
        (InputError, "config.json", ("--prompt", prompt, "--model", tmp_path)),
        (InputError, "one of them", ("--drafter", "prompt_lookup", "--config", typo)),
        (ConfigError, "did you mean max_tokens", ("--model", tiny_model, "--prompt", prompt, "--config", typo)),
        (ConfigError, "unknown drafter", ("--model", tiny_model, "--prompt", prompt, "--drafter", "magic")),
    ):
        with pytest.raises(error, match=words):
            run(*options)


def test_forward_passes_are_counted_at_the_model():
    model = tiny.model()
    with forward_passes(model) as passes:
        model.generate(tiny.prompt(5), max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(passes) == 7
    assert not model._forward_hooks


def test_every_run_gets_its_own_drafter():
    made = []

    def options():
        made.append(Speculative("prompt_lookup"))
        return {"custom_generate": made[-1]}

    class Words:
        chat_template = None

        def __call__(self, text, return_tensors):
            return {"input_ids": tiny.prompt(5)}

        def decode(self, ids, skip_special_tokens):
            return str(ids)

    methods = {PLAIN: greedy(lambda: {"pad_token_id": 0}), "ours": greedy(options)}
    measure(tiny.model(), Words(), "x", "text", methods, max_new_tokens=4, repeats=3)
    assert len({id(one) for one in made}) == 3


@pytest.mark.model
def test_the_shipped_inputs_on_the_real_model(model_path, tmp_path):
    """What the demo is for, but for the speed, which no test asserts: the same text in fewer forward passes.

    How much of a draft is worth verifying is a matter of the machine, so pacing is off.
    """
    (tmp_path / "unpaced.yaml").write_text("pacing: off\n")
    options = ["--json", "--max-new-tokens", 40, "--repeats", 1, "--config", tmp_path / "unpaced.yaml"]
    printed = json.loads(run("--model", model_path, *options).stdout)
    assert [one["input"] for one in printed if one["method"] == PLAIN] == list(SHIPPED)
    assert all(one["identical"] for one in printed if one["method"] != "transformers prompt lookup")
    ours = {one["input"]: one["tokens_per_step"] for one in printed if one["method"] == "freedraft"}
    assert ours["edit-code"] > 2
    assert ours["read-document"] > 1.2
    assert ours["chat"] >= 1
