"""Logits processors: each sees what plain decoding shows it, and only then may a pass be processed as one block."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from freedraft.integrations.hf import Speculative, processors
from freedraft.integrations.hf.processors import ProcessedScores, position_independent

one_thread = tiny.one_thread


OPTIONS: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated bigram": {"no_repeat_ngram_size": 2},
    "no repeated token": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 15, "eos_token_id": list(range(100, 200))},
    "min_length": {"min_length": 20, "eos_token_id": list(range(100, 200))},
    "bad words": {"bad_words_ids": [[70], [26, 26], [4, 158]]},
    "sequence bias": {"sequence_bias": [[[32], 40.0], [[32, 32], -30.0], [[32, 5], 60.0]]},
    "forced eos": {"forced_eos_token_id": 9},
    "suppressed": {"suppress_tokens": list(range(50, 120))},
    "suppressed at first": {"begin_suppress_tokens": list(range(100, 200))},
    "length penalty": {"exponential_decay_length_penalty": (5, 1.4), "eos_token_id": 7},
    "guidance": {"guidance_scale": 1.5},
    "temperature": {"temperature": 5.0},
    "top k": {"temperature": 5.0, "top_k": 20},
    "top p": {"temperature": 5.0, "top_p": 0.8},
    "min p": {"temperature": 5.0, "min_p": 0.05},
    "typical p": {"temperature": 5.0, "typical_p": 0.7},
    "epsilon": {"temperature": 5.0, "epsilon_cutoff": 0.01},
    "eta": {"temperature": 5.0, "eta_cutoff": 0.02},
    "renormalised": {"temperature": 5.0, "top_k": 30, "renormalize_logits": True},
    "all at once": {
        "temperature": 6.0, "top_k": 100, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2, "min_new_tokens": 10, "eos_token_id": [7, 8, 9],
    },
}  # fmt: skip
SAMPLING_ONLY = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


@pytest.mark.parametrize("name", ["truth", "half true", "noise", "copying"])
@pytest.mark.parametrize("which", OPTIONS)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_text_is_that_of_plain_decoding(name: str, which: str, sampled: bool) -> None:
    options = OPTIONS[which]
    if not sampled:
        options = {key: value for key, value in options.items() if key not in SAMPLING_ONLY}
    tiny.assert_same(
        tiny.model(), tiny.prompt(7), tiny.DRAFTERS[name], seed=5, max_new_tokens=30, do_sample=sampled, **options
    )


class Stateful(LogitsProcessor):
    """Its effect depends on how often it was called, and it writes in place; remembers the prefixes it saw."""

    def __init__(self) -> None:
        self.prefixes: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert scores.shape == (1, tiny.VOCABULARY)
        self.prefixes.append(input_ids[0].tolist())
        scores[:, (37 * len(self.prefixes)) % tiny.VOCABULARY] += 50.0
        scores[:, : len(self.prefixes)] -= 5.0
        return scores


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_stateful_processor_sees_each_committed_prefix_once_and_in_order(name: str, sampled: bool) -> None:
    model, ids = tiny.model(), tiny.prompt(7)
    options: dict[str, Any] = {"max_new_tokens": 25, "do_sample": sampled, "temperature": 4.0 if sampled else None}
    reference, ours = Stateful(), Stateful()
    expected = tiny.plain(model, ids, logits_processor=[reference], **options)
    speculative = Speculative(tiny.DRAFTERS[name](expected[0].tolist()))
    actual = tiny.speculative(model, ids, speculative, logits_processor=[ours], **options)
    assert actual.tolist() == expected.tolist()
    assert ours.prefixes == reference.prefixes
    assert ours.prefixes == [expected[0, : 7 + i].tolist() for i in range(25)]


def test_which_processors_are_position_independent() -> None:
    class Counting(logits_process.TopKLogitsWarper):
        pass

    warper = logits_process.TemperatureLogitsWarper(2.0)
    assert position_independent(LogitsProcessorList())
    assert position_independent(LogitsProcessorList([warper, logits_process.TopKLogitsWarper(5)]))
    # A subclass may keep state; a penalty looks at the prefix.
    assert not position_independent(LogitsProcessorList([warper, Counting(5)]))
    assert not position_independent(LogitsProcessorList([logits_process.RepetitionPenaltyLogitsProcessor(1.1)]))
    assert not position_independent(LogitsProcessorList([Stateful()]))


BLOCKS: dict[str, LogitsProcessor] = {
    "TemperatureLogitsWarper": logits_process.TemperatureLogitsWarper(3.0),
    "TopKLogitsWarper": logits_process.TopKLogitsWarper(9),
    "TopPLogitsWarper": logits_process.TopPLogitsWarper(0.8),
    "MinPLogitsWarper": logits_process.MinPLogitsWarper(0.05),
    "TypicalLogitsWarper": logits_process.TypicalLogitsWarper(0.7),
    "EpsilonLogitsWarper": logits_process.EpsilonLogitsWarper(0.01),
    "EtaLogitsWarper": logits_process.EtaLogitsWarper(0.02),
    "SuppressTokensLogitsProcessor": logits_process.SuppressTokensLogitsProcessor([3, 5]),
    "InfNanRemoveLogitsProcessor": logits_process.InfNanRemoveLogitsProcessor(),
    "LogitNormalization": logits_process.LogitNormalization(),
}
if hasattr(logits_process, "TopHLogitsWarper"):
    BLOCKS["TopHLogitsWarper"] = logits_process.TopHLogitsWarper(0.5)


def test_every_position_independent_processor_is_tested() -> None:
    assert {name for name in processors._POSITION_INDEPENDENT if hasattr(logits_process, name)} == set(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_rows(name: str) -> None:
    chosen = LogitsProcessorList([BLOCKS[name]])
    assert position_independent(chosen)
    logits = 3 * torch.randn((1, 20, 500), generator=torch.Generator().manual_seed(1))
    ids = tiny.prompt(4)
    by_row, by_block = (ProcessedScores(chosen, torch.device("cpu")) for _ in range(2))
    by_block.as_block = True
    for scores in (by_row, by_block):
        scores.begin(logits, 8)
    assert by_row.raw.equal(logits[0, -8:])
    for node in range(8):
        row = by_row.row(node, ids)
        assert row.equal(chosen(ids, logits[:, 12 + node]))
        assert by_block.row(node, ids).equal(row)
    assert by_block.block(ids).shape == (8, 500)
    assert by_block.raw.equal(logits[0, -8:])


@pytest.mark.parametrize("which", ["temperature", "top k", "top p", "min p", "all at once", "suppressed"])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_block_path_gives_the_same_text(monkeypatch: pytest.MonkeyPatch, which: str, sampled: bool) -> None:
    made: list[ProcessedScores] = []
    create = ProcessedScores.__init__

    def as_on_an_accelerator(self: ProcessedScores, given: LogitsProcessorList, device: torch.device) -> None:
        create(self, given, device)
        self.as_block = position_independent(given)
        made.append(self)

    monkeypatch.setattr(ProcessedScores, "__init__", as_on_an_accelerator)
    options = {key: value for key, value in OPTIONS[which].items() if sampled or key not in SAMPLING_ONLY}
    for name in ("truth", "half true", "noise"):
        tiny.assert_same(
            tiny.model(), tiny.prompt(7), tiny.DRAFTERS[name], max_new_tokens=30, do_sample=sampled, **options
        )
    assert [scores.as_block for scores in made] == [which != "all at once"] * 3


def test_the_logits_of_a_pass_are_let_go() -> None:
    scores = ProcessedScores(LogitsProcessorList(), torch.device("cpu"))
    scores.begin(torch.zeros(1, 5, 10), 2)
    scores.release()
    assert scores.raw.numel() == 0
