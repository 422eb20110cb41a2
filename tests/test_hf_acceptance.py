"""Acceptance rules by name: exact is the default, typical accepts what is plausible and says that it is lossy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import drafters
import pytest
import tiny
import torch
from small_index import create

from freedraft.integrations.hf import Speculative
from freedraft.integrations.hf.acceptance import Greedy, Sampling, Typical, make_rule
from freedraft.integrations.hf.settings import GenerateSettings
from freedraft.plugins.registry import drafter_names
from freedraft.retrieval.errors import ConfigError

one_thread = tiny.one_thread

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 8.0, "top_k": 0, "max_new_tokens": 40}


def plausible(which: Any, rank: int = 3) -> drafters.Scripted:
    """Drafts, token by token, the target's choice of this rank at temperature 8: plausible, seldom the sample."""

    def propose(text: list[int], budget: int) -> list[int]:
        drafted: list[int] = []
        for _ in range(min(budget, 3)):
            logits = which(torch.tensor([text + drafted])).logits[0, -1]
            drafted.append(int(logits.topk(rank).indices[-1]))
        return drafted

    return drafters.Scripted(propose)


def test_the_threshold_is_that_of_the_paper() -> None:
    probability = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    scores = probability.log()[None]
    entropy = -sum(p * math.log(p) for p in probability.tolist())
    # Here delta * exp(-H) is below epsilon; a token just above it is accepted, one just below is not.
    for token, chance in enumerate(probability.tolist()):
        for factor, accepted in ((1.01, True), (0.99, False)):
            rule = Typical(epsilon=1.0, delta=chance / math.exp(-entropy) / factor)
            torch.manual_seed(1)
            chosen = {rule.choose(scores, [token]) for _ in range(40)}
            assert (chosen == {token}) == accepted
    # With a peaked distribution epsilon is the lower of the two.
    peaked = torch.tensor([[0.98, 0.015, 0.005]]).log()
    assert {Typical(0.01, 1.0).choose(peaked, [1]) for _ in range(40)} == {1}
    torch.manual_seed(1)
    assert 0 in {Typical(0.02, 1.0).choose(peaked, [1]) for _ in range(40)}


def test_of_several_plausible_tokens_the_likeliest() -> None:
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    rule = Typical(0.05, 1.0)
    assert {rule.choose(scores, [3, 1, 2]) for _ in range(20)} == {1}
    assert rule.choose_all(scores) is None


def test_without_a_draft_it_is_sampling() -> None:
    scores = torch.randn((1, 50), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    expected = [Sampling().choose(scores, []) for _ in range(30)]
    torch.manual_seed(3)
    assert [Typical(0.09, 0.3).choose(scores, []) for _ in range(30)] == expected


def test_rules_by_name() -> None:
    typical = GenerateSettings(acceptance="typical", epsilon=0.2, delta=0.4)
    assert isinstance(make_rule(GenerateSettings(), sampled=True), Sampling)
    assert isinstance(make_rule(GenerateSettings(), sampled=False), Greedy)
    assert isinstance(make_rule(typical, sampled=True), Typical)
    # At temperature 0 nothing but the likeliest token is plausible.
    assert isinstance(make_rule(typical, sampled=False), Greedy)


def test_typical_acceptance_accepts_more_and_says_that_it_is_lossy() -> None:
    which, ids = tiny.model(), tiny.prompt()
    exact = Speculative(plausible(which))
    expected = tiny.plain(which, ids, 1, **SAMPLED)
    assert tiny.speculative(which, ids, exact, 1, **SAMPLED).equal(expected)
    typical = Speculative(plausible(which), generate={"acceptance": "typical"})
    assert not tiny.speculative(which, ids, typical, 1, **SAMPLED).equal(expected)
    assert exact.statistics is not None
    assert typical.statistics is not None
    assert typical.statistics.acceptance_rate > 2 * exact.statistics.acceptance_rate
    assert (exact.statistics.lossy, typical.statistics.lossy) == (0, 1)
    assert "lossy" not in str(exact.statistics)
    assert str(typical.statistics).endswith("; lossy acceptance")
    assert typical.statistics.as_dict()["lossy"] == typical.totals.lossy == 1
    # Not with greedy decoding, where it is exact match.
    assert tiny.speculative(which, ids, typical, max_new_tokens=20).equal(tiny.plain(which, ids, max_new_tokens=20))
    assert typical.statistics.lossy == 0


def test_typical_acceptance_in_a_tree() -> None:
    which, ids = tiny.model(), tiny.prompt()

    def grow(text: list[int], budget: int) -> list[tuple[int, int]]:
        second, third = which(torch.tensor([text])).logits[0, -1].topk(3).indices[1:].tolist()
        return [(third, -1), (second, -1), (second, 1)][:budget]

    ours = Speculative(drafters.Branching(grow), generate={"acceptance": "typical", "epsilon": 0.01})
    text = tiny.speculative(which, ids, ours, 1, **SAMPLED)[0].tolist()
    assert ours.statistics is not None
    assert ours.statistics.accepted > 10
    assert len(text) == 52


def test_lossy_output_appears_nowhere_unless_asked_for_by_name(tmp_path: Path) -> None:
    which, ids = tiny.model(), tiny.prompt(40) % 3 + 50
    only_three = {**SAMPLED, "suppress_tokens": [*range(50), *range(53, tiny.VOCABULARY)]}
    expected = tiny.plain(which, ids, 7, **only_three)
    needed = {"corpus": {"index": create(tmp_path / "index", [ids[0].tolist()])}}
    for name in drafter_names():
        ours = Speculative(name, **needed.get(name, {}))
        assert tiny.speculative(which, ids, ours, 7, **only_three).equal(expected), name
        assert ours.statistics is not None
        assert ours.statistics.lossy == 0
    with pytest.raises(ConfigError, match=r"epsilon: .*typical, which is lossy and must be asked for by name"):
        Speculative(generate={"epsilon": 0.5})
    with pytest.raises(ConfigError, match=r"delta: .*asked for by name"):
        Speculative(generate={"acceptance": "exact", "delta": 0.5})
    with pytest.raises(ConfigError, match=r"acceptance: .*'exact' or 'typical'"):
        Speculative(generate={"acceptance": "tipical"})
    with pytest.raises(ConfigError, match=r"epsilon: .*greater than 0"):
        Speculative(generate={"acceptance": "typical", "epsilon": 0})
