"""A real chat model, a real tokenizer: the text is the plain one, in fewer forward passes."""

from __future__ import annotations

from typing import Any

import drafters
import pytest
import tiny
from transformers import TextIteratorStreamer

from freedraft.integrations.hf import Speculative

pytestmark = pytest.mark.model
one_thread = tiny.one_thread

CODE = """\
def total_price(items, tax_rate):
    subtotal = 0
    for item in items:
        subtotal += item.price * item.quantity
    tax = subtotal * tax_rate
    return subtotal + tax
"""


def ask(tokenizer: Any, question: str) -> Any:
    messages = [{"role": "user", "content": question}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(chat, return_tensors="pt", add_special_tokens=False)


def test_editing_code_takes_fewer_forward_passes(model: Any, tokenizer: Any) -> None:
    inputs = ask(tokenizer, f"Repeat this code exactly.\n```python\n{CODE}```")
    expected = tiny.plain(model, None, **inputs, max_new_tokens=60)
    ours = Speculative("suffix_automaton", max_tokens=12)
    assert tiny.speculative(model, None, ours, **inputs, max_new_tokens=60).equal(expected)
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 0
    assert ours.statistics.tokens_per_step > 1.5


@pytest.mark.parametrize(("seed", "drafter"), [(1, "suffix_automaton"), (2, "half true")])
def test_sampling_at_high_temperature(model: Any, tokenizer: Any, seed: int, drafter: str) -> None:
    inputs = ask(tokenizer, "Write a poem of nonsense words.")
    options = {"max_new_tokens": 25, "do_sample": True, "temperature": 1.8, "top_p": 0.98, "top_k": 0}
    expected = tiny.plain(model, None, seed, **inputs, **options)
    text = expected[0].tolist()
    ours = Speculative(drafters.half_true(text, 49152) if drafter == "half true" else drafter)
    assert tiny.speculative(model, None, ours, seed, **inputs, **options).equal(expected)
    # Hardly a token twice: neither greedy decoding nor a copy would pass for it.
    assert len(set(text[-25:])) > 15


def test_stop_strings_and_streamer_with_a_byte_level_tokenizer(model: Any, tokenizer: Any) -> None:
    inputs = ask(tokenizer, f"Repeat this code exactly.\n```python\n{CODE}```")
    text = tokenizer.decode(tiny.plain(model, None, **inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :])
    stop = text[len(text) // 2 :][:5]
    expected = tiny.plain(model, None, **inputs, max_new_tokens=40, stop_strings=[stop], tokenizer=tokenizer)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    ours = Speculative("prompt_lookup", min_match=1, tokenizer=tokenizer, streamer=streamer)
    actual = tiny.speculative(model, None, ours, **inputs, max_new_tokens=40, stop_strings=[stop])
    assert actual.equal(expected)
    output = tokenizer.decode(actual[0, inputs["input_ids"].shape[1] :])
    assert stop in output
    assert len(output) < len(text)
    assert "".join(streamer) == output
    assert ours.statistics is not None
    assert ours.statistics.accepted > 0


def test_the_answer_ends_at_the_end_of_sequence(model: Any, tokenizer: Any) -> None:
    inputs = ask(tokenizer, "What is the capital of France? Answer in one short sentence.")
    expected = tiny.plain(model, None, **inputs, max_new_tokens=40)
    assert expected[0, -1] == model.generation_config.eos_token_id
    for drafter in (drafters.truth([*expected[0].tolist(), 5, 6, 7]), "suffix_automaton"):
        assert tiny.speculative(model, None, Speculative(drafter), **inputs, max_new_tokens=40).equal(expected)
