"""`generate(custom_generate=Speculative(...))` gives what plain `generate` gives: text, length, end, stream."""

from __future__ import annotations

from typing import Any

import drafters
import pytest
import tiny
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from freedraft.integrations.hf import Speculative
from freedraft.retrieval.errors import InputError

one_thread = tiny.one_thread


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize("length", [1, 2, 12, 40])
def test_greedy_is_token_identical(name: str, length: int) -> None:
    tiny.assert_same(tiny.model(), tiny.prompt(length), tiny.DRAFTERS[name], max_new_tokens=50)


def test_a_true_draft_saves_forward_passes() -> None:
    ours = tiny.assert_same(tiny.model(), tiny.prompt(), drafters.truth, max_new_tokens=50)
    assert ours.statistics is not None
    # The prompt's pass gives token 1, the next pass all the others: 48 drafted, and the target's own last.
    assert (ours.statistics.forward_passes, ours.statistics.drafted, ours.statistics.accepted) == (2, 48, 48)
    assert ours.statistics.tokens_per_step == 25.0


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_sampling_draws_the_same_random_stream(name: str, seed: int, temperature: float) -> None:
    tiny.assert_same(
        tiny.model(),
        tiny.prompt(seed=seed),
        tiny.DRAFTERS[name],
        seed=seed,
        max_new_tokens=50,
        do_sample=True,
        temperature=temperature,
        top_k=0,
    )


def test_sampling_at_temperature_8_has_high_entropy() -> None:
    # Otherwise the test above would not tell sampling from greedy decoding.
    logits = tiny.model()(tiny.prompt()).logits[0] / 8
    assert torch.distributions.Categorical(logits=logits).entropy().mean() > 4.5
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 8.0}
    texts = {tuple(tiny.plain(tiny.model(), tiny.prompt(), seed, **options)[0].tolist()) for seed in range(5)}
    assert len(texts) == 5


@pytest.mark.parametrize("new", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("name", ["truth", "half true", "noise"])
def test_never_past_max_new_tokens(name: str, new: int) -> None:
    tiny.assert_same(tiny.model(), tiny.prompt(), tiny.DRAFTERS[name], max_new_tokens=new)


def test_max_length_counts_the_prompt() -> None:
    ours = tiny.assert_same(tiny.model(), tiny.prompt(12), drafters.truth, max_length=20)
    assert ours.statistics is not None
    assert ours.statistics.tokens == 8


def test_the_shortest_of_several_lengths_counts() -> None:
    from transformers import MaxLengthCriteria

    class Twice(MaxLengthCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return super().__call__(torch.cat([input_ids, input_ids], dim=1), scores)

    tiny.assert_same(
        tiny.model(), tiny.prompt(12), drafters.truth, max_new_tokens=40, stopping_criteria=[MaxLengthCriteria(17)]
    )
    tiny.assert_same(tiny.model(), tiny.prompt(12), drafters.truth, max_new_tokens=40, stopping_criteria=[Twice(34)])


def test_no_draft_is_asked_for_without_room() -> None:
    drafter = drafters.noise(tiny.VOCABULARY)
    tiny.speculative(tiny.model(), tiny.prompt(), Speculative(drafter, generate={"max_draft": 4}), max_new_tokens=9)
    budgets = [details[0] for method, details in drafter.calls if method == "draft"]
    # Nothing of the noise is accepted, so each pass adds one token; the last has no room for a draft.
    assert budgets == [4, 4, 4, 4, 3, 2, 1]


def test_max_draft_zero_never_drafts() -> None:
    ours = Speculative(drafters.noise(tiny.VOCABULARY), generate={"max_draft": 0})
    tiny.speculative(tiny.model(), tiny.prompt(), ours, max_new_tokens=9)
    assert ours.statistics is not None
    assert (ours.statistics.forward_passes, ours.statistics.drafted) == (9, 0)


@pytest.mark.parametrize("place", [0, 1, 5, 19])
@pytest.mark.parametrize("sampled", [False, True])
def test_eos_inside_a_draft_ends_the_text(place: int, sampled: bool) -> None:
    model, ids = tiny.model(), tiny.prompt(5, seed=3)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": sampled}
    endless = tiny.plain(model, ids, **options)[0].tolist()
    eos = endless[5 + place]
    ours = tiny.assert_same(model, ids, lambda text: drafters.truth(endless), eos_token_id=[eos, 199], **options)
    assert ours.statistics is not None
    assert ours.statistics.tokens == endless[5:].index(eos) + 1


def test_a_draft_is_cut_before_eos() -> None:
    # The target gives the end of sequence for nothing, and what is drafted behind it can't become text.
    model, ids = tiny.model(), tiny.prompt(5, seed=3)
    endless = tiny.plain(model, ids, max_new_tokens=30)[0].tolist()
    place = next(i for i in range(8, 30) if endless[5 + i] not in endless[5 : 5 + i])
    ours = Speculative(drafters.truth(endless))
    tiny.speculative(model, ids, ours, max_new_tokens=30, eos_token_id=endless[5 + place])
    assert ours.statistics is not None
    assert (ours.statistics.forward_passes, ours.statistics.drafted) == (2, place - 1)


class Asked(StoppingCriteria):
    """Stops at a length, and remembers the texts that it was asked about."""

    def __init__(self, length: int = 10**9) -> None:
        self.length = length
        self.texts: list[list[int]] = []
        self.kept: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.texts.append(input_ids[0].tolist())
        self.kept.append(input_ids)
        return torch.tensor([input_ids.shape[1] >= self.length])


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize("length", [13, 18, 10**9])
def test_criteria_are_asked_after_every_token_and_stop_inside_a_draft(name: str, length: int) -> None:
    model, ids = tiny.model(), tiny.prompt(12)
    reference, ours = Asked(length), Asked(length)
    text = tiny.plain(model, ids, max_new_tokens=25)[0].tolist()
    expected = tiny.plain(model, ids, max_new_tokens=25, stopping_criteria=StoppingCriteriaList([reference]))
    speculative = Speculative(tiny.DRAFTERS[name](text))
    actual = tiny.speculative(model, ids, speculative, max_new_tokens=25, stopping_criteria=[ours])
    assert actual.tolist() == expected.tolist()
    assert ours.texts == reference.texts
    # What was handed out must not change behind the back of one who keeps it.
    assert [kept[0].tolist() for kept in ours.kept] == reference.texts


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize("width", [1, 2])
def test_stop_strings_stop_at_the_token_that_completes_them(name: str, width: int) -> None:
    model, ids, tokenizer = tiny.model(), tiny.prompt(12), tiny.tokenizer()
    text = tiny.plain(model, ids, max_new_tokens=30)[0].tolist()
    stop = tokenizer.decode(text[20 : 20 + width])
    assert len(stop) == width
    expected = tiny.plain(model, ids, max_new_tokens=30, stop_strings=[stop], tokenizer=tokenizer)
    assert expected.shape[1] < 42
    ours = Speculative(tiny.DRAFTERS[name](text), tokenizer=tokenizer)
    actual = tiny.speculative(model, ids, ours, max_new_tokens=30, stop_strings=[stop])
    assert actual.tolist() == expected.tolist()
    # As one string, too, and with a tokenizer given to generate, which drops it.
    actual = tiny.speculative(model, ids, ours, max_new_tokens=30, stop_strings=stop, tokenizer=tokenizer)
    assert actual.tolist() == expected.tolist()


def test_stop_strings_need_the_tokenizer() -> None:
    with pytest.raises(InputError, match=r"Speculative\(\.\.\., tokenizer=tokenizer\)"):
        tiny.speculative(tiny.model(), tiny.prompt(), Speculative(drafters.never()), stop_strings=["x"])


class Recording:
    """A streamer that remembers what it was given."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.events.append((tuple(value.shape), value.dtype, value.tolist()))

    def end(self) -> None:
        self.events.append("end")


@pytest.mark.parametrize("name", tiny.DRAFTERS)
def test_a_streamer_gets_what_plain_decoding_gives_it(name: str) -> None:
    model, ids = tiny.model(), tiny.prompt(12)
    reference, streamer = Recording(), Recording()
    text = tiny.plain(model, ids, max_new_tokens=20, streamer=reference)[0].tolist()
    ours = Speculative(tiny.DRAFTERS[name](text), streamer=streamer)
    tiny.speculative(model, ids, ours, max_new_tokens=20)
    assert streamer.events == reference.events
    assert len(streamer.events) == 22


@pytest.mark.parametrize("name", tiny.DRAFTERS)
@pytest.mark.parametrize("padding", [1, 7])
def test_left_padding(name: str, padding: int) -> None:
    ids = torch.cat([torch.full((1, padding), 2), tiny.prompt(9)], dim=1)
    mask = (torch.arange(padding + 9) >= padding).long()[None]
    ours = tiny.assert_same(tiny.model(), ids, tiny.DRAFTERS[name], attention_mask=mask, max_new_tokens=30)
    drafter = ours.drafter
    assert isinstance(drafter, drafters.Scripted)
    # The padding is no text: the drafter must not see it.
    assert drafter.calls[0] == ("open", [tiny.prompt(9)[0].tolist()])
    # And it must make no difference to what is written.
    unpadded = tiny.plain(tiny.model(), tiny.prompt(9), max_new_tokens=30)[0, 9:].tolist()
    assert tiny.plain(tiny.model(), ids, attention_mask=mask, max_new_tokens=30)[0, 9 + padding :].tolist() == unpadded


def test_from_the_bos_token_alone() -> None:
    expected = tiny.model().generate(max_new_tokens=20)
    ours = Speculative(drafters.truth(expected[0].tolist()))
    assert tiny.model().generate(max_new_tokens=20, custom_generate=ours).tolist() == expected.tolist()


def test_an_embedded_prompt() -> None:
    model = tiny.model()
    embeds = model.get_input_embeddings()(tiny.prompt(9)).detach()
    expected = model.generate(inputs_embeds=embeds, max_new_tokens=30)
    # No prompt to draft from: the drafter sees the output only.
    for drafter in (drafters.truth(expected[0].tolist()), drafters.half_true(expected[0].tolist(), tiny.VOCABULARY)):
        ours = Speculative(drafter)
        assert model.generate(inputs_embeds=embeds, max_new_tokens=30, custom_generate=ours).equal(expected)
        assert ours.statistics is not None
        assert ours.statistics.accepted > 0


def test_prompt_in_chunks() -> None:
    tiny.assert_same(tiny.model(), tiny.prompt(13), drafters.truth, prefill_chunk_size=4, max_new_tokens=20)


def test_empty_prompt() -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        tiny.speculative(tiny.model(), torch.zeros((1, 0), dtype=torch.long), Speculative(drafters.never()))


def test_half_precision_runs() -> None:
    # bfloat16 may flip a near-tie with the number of positions in a pass, so the text is not compared.
    import copy

    model = copy.deepcopy(tiny.model()).to(torch.bfloat16)
    ours = Speculative(drafters.copying(ngram=1))
    output = tiny.speculative(
        model, tiny.prompt(), ours, max_new_tokens=20, return_dict_in_generate=True, output_scores=True
    )
    assert output.sequences.shape == (1, 32)
    assert {score.dtype for score in output.scores} == {torch.float32}
