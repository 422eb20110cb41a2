"""The `Speculative` object: how it is made, what it keeps and reports, how it survives its drafter."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import drafters
import numpy as np
import pytest
import tiny
import torch

from freedraft.integrations.hf import Speculative, Statistics
from freedraft.integrations.hf.draft import Chain, as_draft
from freedraft.plugins.base import Drafts
from freedraft.plugins.branches import likeliest_chains
from freedraft.plugins.config import Config
from freedraft.plugins.fusion import Fusion
from freedraft.plugins.prompt_lookup import PromptLookup
from freedraft.retrieval.errors import ConfigError

one_thread = tiny.one_thread


def settings_of(ours: Speculative) -> Any:
    return ours.drafter.settings  # type: ignore[attr-defined]


def test_the_default_drafter() -> None:
    ours = Speculative()
    assert isinstance(ours.drafter, Fusion)
    assert ours.pacing is not None


def test_a_drafter_by_name_with_settings() -> None:
    ours = Speculative("prompt_lookup", max_tokens=5)
    assert isinstance(ours.drafter, PromptLookup)
    assert settings_of(ours).max_tokens == 5
    assert repr(ours) == "Speculative(PromptLookup)"


@pytest.mark.parametrize("kind", ["yaml", "path", "dict", "json", "config"])
def test_a_configuration(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("drafter: prompt_lookup\nmax_tokens: 5\ngenerate:\n  max_draft: 3\n")
    mapping = {"drafter": "prompt_lookup", "max_tokens": 5, "generate": {"max_draft": 3}}
    config: Any = {
        "yaml": str(file),
        "path": file,
        "dict": mapping,
        "json": json.dumps(mapping),
        "config": Config("prompt_lookup", {"max_tokens": 5}, {"generate": {"max_draft": 3}}),
    }[kind]
    ours = Speculative(config=config)
    assert isinstance(ours.drafter, PromptLookup)
    assert settings_of(ours).max_tokens == 5
    assert ours._settings.max_draft == 3
    # Keywords override it, one by one.
    ours = Speculative(config=config, max_tokens=6, generate={})
    assert (settings_of(ours).max_tokens, ours._settings.max_draft) == (6, 3)


def test_a_drafter_of_the_users_own() -> None:
    drafter = drafters.never()
    assert Speculative(drafter).drafter is drafter
    assert Speculative(drafter, generate={"max_draft": 3})._settings.max_draft == 3


def test_an_unknown_drafter() -> None:
    with pytest.raises(ConfigError, match="unknown drafter 'sufix_automaton'; did you mean suffix_automaton"):
        Speculative("sufix_automaton")


def test_the_class_in_place_of_an_object() -> None:
    with pytest.raises(ConfigError, match=r"expected an object, Speculative\(\)"):
        tiny.model().generate(tiny.prompt(), max_new_tokens=3, custom_generate=Speculative)


def test_a_typo_in_a_setting() -> None:
    with pytest.raises(ConfigError, match="max_token: unknown setting; did you mean max_tokens"):
        Speculative("suffix_automaton", max_token=12)
    for section in ("gpu", "vllm"):
        with pytest.raises(ConfigError, match=f"{section}: max_drafts: unknown setting"):
            Speculative(config={section: {"max_drafts": 3}})
    with pytest.raises(ConfigError, match="generate: max_drafts: unknown setting; did you mean max_draft"):
        Speculative(generate={"max_drafts": 12})
    with pytest.raises(ConfigError, match=r"generate: max_draft: .*greater than or equal to 0"):
        Speculative(generate={"max_draft": -1})


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        Speculative("prompt_lookup", config={"drafter": "suffix_automaton"})
    with pytest.raises(ConfigError, match="max_tokens: settings are for a drafter that is given by name"):
        Speculative(drafters.never(), max_tokens=3)
    with pytest.raises(ConfigError, match="expected a name or a Drafter, got 3"):
        Speculative(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        Speculative(config=tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["suffix_automaton", "prompt_lookup"])
def test_our_own_drafters_give_the_plain_text(name: str) -> None:
    model = tiny.model()
    ids = tiny.prompt(60) % 3 + 50
    # Only three tokens are written, so that there is something to find.
    only_three: dict[str, Any] = {"suppress_tokens": [*range(50), *range(53, tiny.VOCABULARY)], "max_new_tokens": 60}
    for options in (only_three, {**only_three, "do_sample": True, "temperature": 2.0}):
        expected = tiny.plain(model, ids, **options)
        ours = Speculative(name, max_tokens=12)
        assert tiny.speculative(model, ids, ours, **options).equal(expected)
        assert ours.statistics is not None
        assert ours.statistics.drafter_errors == 0
        assert ours.statistics.accepted > 0


def test_the_drafter_lives_on_between_calls() -> None:
    drafter = drafters.copying()
    ours = Speculative(drafter)
    texts = [
        tiny.speculative(tiny.model(), tiny.prompt(seed=seed), ours, max_new_tokens=10)[0].tolist() for seed in range(3)
    ]
    # Each sequence is closed, and had been told the whole text: shared caches learn from the last tokens too.
    assert drafter.closed == texts
    assert drafter.texts == {}


def test_statistics_of_a_call_and_of_all() -> None:
    model, ids = tiny.model(), tiny.prompt()
    text = tiny.plain(model, ids, max_new_tokens=30)[0].tolist()
    ours = Speculative(drafters.truth(text), generate={"max_draft": 9})
    assert ours.statistics is None
    tiny.speculative(model, ids, ours, max_new_tokens=30)
    first = ours.statistics
    assert first is not None
    # 1 from the prompt, then 10 + 10 + 9.
    assert (first.calls, first.tokens, first.forward_passes, first.drafts) == (1, 30, 4, 3)
    assert (first.drafted, first.accepted, first.acceptance_rate) == (26, 26, 1.0)
    assert first.tokens_per_step == 7.5
    parts = (first.prefill_seconds, first.drafting_seconds, first.verifying_seconds, first.rest_seconds)
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(first.total_seconds)
    tiny.speculative(model, ids, ours, max_new_tokens=12)
    assert ours.statistics is not first
    assert ours.statistics is not None
    assert ours.statistics.tokens == 12
    assert (ours.totals.calls, ours.totals.tokens) == (2, 42)
    assert ours.totals.total_seconds == first.total_seconds + ours.statistics.total_seconds


def test_rejected_tokens_are_drafted_but_not_accepted() -> None:
    model, ids = tiny.model(), tiny.prompt()
    text = tiny.plain(model, ids, max_new_tokens=30)[0].tolist()

    def two_true_then_wrong(so_far: list[int], budget: int) -> list[int]:
        following = text[len(so_far) : len(so_far) + 4]
        return [*following[:2], *((token + 1) % tiny.VOCABULARY for token in following[2:])][:budget]

    ours = Speculative(drafters.Scripted(two_true_then_wrong))
    assert tiny.speculative(model, ids, ours, max_new_tokens=13)[0].tolist() == text[:25]
    assert ours.statistics is not None
    # 1 from the prompt, then four passes of 2 accepted tokens and the target's own; the last has room for 2 only.
    assert (ours.statistics.tokens, ours.statistics.forward_passes) == (13, 5)
    assert (ours.statistics.drafted, ours.statistics.accepted) == (4 + 4 + 4 + 2, 8)


def test_statistics_as_text_and_as_json() -> None:
    statistics = Statistics(1, 30, 10, 8, 40, 20, 2, 0.5, 0.25, 1.0, 2.0, 40, 10)
    assert str(statistics) == (
        "30 tokens in 10 forward passes (3.00 tokens a step); 20 of 40 draft tokens accepted (50%); "
        "2.000 s (prefill 0.500, drafting 0.250, verifying 1.000, rest 0.250); 2 drafter errors"
    )
    values = json.loads(json.dumps(statistics.as_dict()))
    assert values["tokens_per_step"] == 3.0
    assert values["tokens_per_second"] == 15.0
    assert values["rest_seconds"] == 0.25
    assert values["acceptance_rate"] == 0.5
    assert values["drafter_errors"] == 2
    assert str(Statistics()).startswith("0 tokens in 0 forward passes (0.00 tokens a step); 0 of 0")
    assert Statistics().tokens_per_second == 0.0


@pytest.mark.parametrize("chance", [0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampled", [False, True])
def test_a_drafter_that_raises_changes_nothing_but_the_speed(chance: float, seed: int, sampled: bool) -> None:
    model, ids = tiny.model(), tiny.prompt()
    expected = tiny.plain(model, ids, max_new_tokens=100, do_sample=sampled, temperature=3.0 if sampled else None)
    drafter = drafters.Raising(drafters.truth(expected[0].tolist()), chance, seed)
    ours = Speculative(drafter, generate={"max_draft": 3})
    actual = tiny.speculative(
        model, ids, ours, max_new_tokens=100, do_sample=sampled, temperature=3.0 if sampled else None
    )
    assert actual.equal(expected)
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == drafter.raised > 0
    assert f"{drafter.raised} drafter errors" in str(ours.statistics)
    assert (ours.statistics.accepted > 0) == (chance < 1.0)


def test_a_drafter_that_lost_the_sequence_gets_it_back() -> None:
    model, ids = tiny.model(), tiny.prompt()
    text = tiny.plain(model, ids, max_new_tokens=120)[0].tolist()

    class Forgetful(drafters.Scripted):
        """Raises the first time that it is told of tokens, as the guard cannot know what it holds then."""

        failures = 0

        def extend(self, slots: Any, tokens: Any, offsets: Any) -> None:
            if not self.failures:
                self.failures += 1
                raise RuntimeError("on purpose")
            super().extend(slots, tokens, offsets)

    drafter = Forgetful(drafters.truth(text).propose)
    ours = Speculative(drafter)
    assert tiny.speculative(model, ids, ours, max_new_tokens=120)[0].tolist() == text
    opened = [details for method, details in drafter.calls if method == "open"]
    # Anew after 16 tokens, with the whole text; the rest of the text is then drafted at once.
    assert [len(rows[0]) for rows in opened] == [12, 12 + 2 + 16]
    assert opened[1][0] == text[:30]
    assert ours.statistics is not None
    assert ours.statistics.drafter_errors == 1
    assert ours.statistics.forward_passes < 25
    assert drafter.closed[-1] == text


def test_a_drafter_that_always_loses_the_sequence_is_asked_less_and_less() -> None:
    drafter = drafters.Raising(drafters.never(), 1.0, spared=("open", "draft", "close"))
    ours = Speculative(drafter)
    tiny.speculative(tiny.model(), tiny.prompt(), ours, max_new_tokens=200)
    opened = [len(details[0]) for method, details in drafter.calls if method == "open"]
    assert len(opened) == 4
    gaps = np.diff(opened)
    assert (gaps[1:] > 1.7 * gaps[:-1]).all()


@pytest.mark.parametrize("kind", drafters.MALFORMED)
def test_malformed_drafts_are_counted_and_never_used(kind: str) -> None:
    model, ids = tiny.model(), tiny.prompt()
    expected = tiny.plain(model, ids, max_new_tokens=20)
    ours = Speculative(drafters.Malformed(drafters.MALFORMED[kind]))
    assert tiny.speculative(model, ids, ours, max_new_tokens=20).equal(expected)
    assert ours.statistics is not None
    assert ours.statistics.drafted == 0
    # One pass for the prompt, and the last has no room for a draft.
    assert ours.statistics.drafter_errors == 18


def test_the_slot_is_closed_when_generate_fails() -> None:
    def failing(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] == 15:
            raise KeyError("the user's own mistake")
        return torch.tensor([False])

    drafter = drafters.noise(tiny.VOCABULARY)
    ours = Speculative(drafter)
    with pytest.raises(KeyError, match="own mistake"):
        tiny.speculative(tiny.model(), tiny.prompt(12), ours, max_new_tokens=20, stopping_criteria=[failing])
    assert drafter.texts == {}
    assert ours.statistics is not None
    assert ours.statistics.forward_passes == 3


class Listening(drafters.Scripted):
    """Wants all the feedback there is."""

    feedback: ClassVar[frozenset[Any]] = frozenset({"accepted", "argmax", "top_k"})
    feedback_top_k = 3


def test_feedback() -> None:
    model, ids = tiny.model(), tiny.prompt()
    text = tiny.plain(model, ids, max_new_tokens=30)[0].tolist()
    drafter = Listening(drafters.half_true(text, tiny.VOCABULARY, seed=4).propose)
    ours = Speculative(drafter, generate={"max_draft": 5})
    assert tiny.speculative(model, ids, ours, max_new_tokens=30)[0].tolist() == text
    methods = [method for method, _ in drafter.calls]
    steps = methods.count("observe")
    assert ours.statistics is not None
    assert steps == ours.statistics.forward_passes - 1
    written, accepted = 13, 0
    for i, (method, feedback) in enumerate(drafter.calls):
        if method != "observe":
            continue
        # Before the tokens that it speaks of.
        committed = drafter.calls[i + 1][1]
        assert methods[i + 1] == "extend"
        count = int(feedback.accepted[0])
        assert feedback.offsets.dtype == np.int64
        assert feedback.accepted.dtype == feedback.argmax.dtype == feedback.top_k.dtype == np.int32
        positions = int(feedback.offsets[1])
        assert feedback.argmax.shape == (positions,)
        assert feedback.top_k.shape == (positions, 3)
        assert feedback.top_k[:, 0].tolist() == feedback.argmax.tolist()
        assert feedback.argmax[: count + 1].tolist() == text[written : written + count + 1]
        assert committed == text[written : written + len(committed)]
        written += len(committed)
        accepted += count
    assert written == len(text)
    assert accepted == ours.statistics.accepted > 0


def test_no_feedback_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = drafters.noise(tiny.VOCABULARY)
    tiny.speculative(tiny.model(), tiny.prompt(), Speculative(drafter), max_new_tokens=10)
    assert "observe" not in [method for method, _ in drafter.calls]

    class Curious(drafters.Scripted):
        feedback: ClassVar[frozenset[Any]] = frozenset({"accepted"})

    curious = Curious(drafter.propose)
    tiny.speculative(tiny.model(), tiny.prompt(), Speculative(curious), max_new_tokens=10)
    told = [details for method, details in curious.calls if method == "observe"]
    assert len(told) == 9
    assert all(feedback.argmax is None and feedback.top_k is None for feedback in told)


def test_calls_from_several_threads() -> None:
    model = tiny.model()
    ids = [tiny.prompt(20, seed=seed) % 3 + 50 for seed in range(4)]
    expected = [tiny.plain(model, each, max_new_tokens=40).tolist() for each in ids]
    ours = Speculative("suffix_automaton")
    actual: list[Any] = [None] * 4

    def work(i: int) -> None:
        actual[i] = model.generate(ids[i], max_new_tokens=40, custom_generate=ours).tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert actual == expected
    assert (ours.totals.calls, ours.totals.tokens) == (4, 160)


def test_a_tree_is_reduced_to_its_likeliest_branch() -> None:
    tree = Drafts(
        np.array([10, 20, 11, 21, 22], np.int32),
        np.array([-1, -1, 0, 1, 1], np.int32),
        np.array([0.4, 0.5, 0.39, 0.1, 0.3], np.float32),
        np.zeros(5, np.uint8),
        np.array([0, 5]),
    )
    assert as_draft(likeliest_chains(tree)[0]) == Chain([20, 22])
    chain = drafters.chain([1, 2, 3])
    assert as_draft(likeliest_chains(chain)[0]) == Chain([1, 2, 3])


def test_importing_the_package_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, freedraft.integrations.hf as hf; sys.exit('torch' in sys.modules or hasattr(hf, 'Nothing'))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
