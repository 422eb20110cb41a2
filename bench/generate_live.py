"""Decode with `generate` and the demo model: plain, transformers' prompt lookup, and freedraft's drafters.

The drafter over an index has a table of its own (`corpus_live.py`).

All methods answer the same prompts of four tasks at the same time, taking turns at every forward pass, so that they
meet the same machine; the clock of each, pacing's too, stands still while others have their turn. Each drafter object
was warmed up with prompts of each task that are not measured: kernels, and what pacing and the mixer learn. Every reply
is compared with plain's; one that differs must leave it where plain's two best tokens are nearly equal, or the run
fails.

    python bench/generate_live.py [--tokens 64] [--prompts 3] [--only METHOD ...] [--all] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from harness import RESULTS, markdown, median, save, show
from tasks import tasks
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import Turns
from vllm_runs import prompt

from freedraft.integrations.hf import Speculative, drafting, loop, speculative
from freedraft.integrations.hf.smollm2 import demo_model_path

BATCH = 4
TIE = 1e-3
"""Logits this near are a tie: blocks of tokens are computed with other kernels than single ones."""
PLAIN = "plain"
LOOKUP = "transformers prompt lookup"
EVERYTHING: dict[str, Any] = {"recycling": True, "drafters": {"jacobi": {}, "lookahead": {}}}
DRAFTERS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"drafter": "prompt_lookup"},
    "suffix_automaton": {"drafter": "suffix_automaton"},
    "token_recycling, paced": {"drafter": "token_recycling", "pacing": "on"},
    "lookahead, paced": {"drafter": "lookahead", "pacing": "on"},
    "jacobi": {"drafter": "jacobi"},
    "fusion": {"drafter": "fusion"},
    "fusion, trees": {"drafter": "fusion", "shape": "tree"},
    "fusion with recycling": {"drafter": "fusion", "recycling": True},
    "fusion with recycling, trees": {"drafter": "fusion", "recycling": True, "shape": "tree"},
    "fusion with everything": {"drafter": "fusion", **EVERYTHING},
    "fusion with everything, trees": {"drafter": "fusion", **EVERYTHING, "shape": "tree"},
}
SLOW: dict[str, dict[str, Any]] = {
    "token_recycling": {"drafter": "token_recycling"},
    "lookahead": {"drafter": "lookahead"},
    "jacobi, paced": {"drafter": "jacobi", "pacing": "on"},
    "fusion, unpaced": {"drafter": "fusion", "pacing": "off"},
    "fusion with recycling, unpaced": {"drafter": "fusion", "recycling": True, "pacing": "off"},
}
"""Without pacing a CPU verifies more than pays: these take most of the time, and are left out unless asked for."""


TURNS = Turns()
for module in (loop, drafting, speculative):
    module.perf_counter = TURNS.clock  # type: ignore[attr-defined]


@dataclass
class Passes:
    """The forward passes of a model: how many each piece of work asked for, and their seconds, its prompt's first."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def watch(self, model: Any) -> None:
        """Pass the turn on before every pass of `model`, and time the pass."""
        started: dict[str, float] = {}

        def before(*_: Any) -> None:
            TURNS.pass_on()
            started[TURNS.name] = TURNS.clock()

        model.register_forward_pre_hook(before)
        model.register_forward_hook(lambda *_: self.seconds[TURNS.name].append(TURNS.clock() - started[TURNS.name]))

    def taken(self) -> list[float]:
        """Those of the piece of work that has its turn, which are forgotten."""
        return self.seconds.pop(TURNS.name)


@dataclass
class Answer:
    """What a method made of a batch of prompts.

    Attributes:
        replies: token ids.
        seconds: from end to end.
        forward: seconds of each forward pass but the one over the prompt.
        steps: forward passes, each counted for every sequence in it.
    """

    replies: list[list[int]]
    seconds: float
    forward: list[float]
    steps: int


def method(
    model: Any, passes: Passes, tokens: int, ours: Speculative | None = None, **options: Any
) -> Callable[[Any], Answer]:
    """One that answers a batch of inputs, up to `tokens` tokens each; `ours` keeps its drafter from call to call."""
    if ours is not None:
        options["custom_generate"] = ours
    end = model.generation_config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or ())

    def answer(inputs: Any) -> Answer:
        started = TURNS.clock()
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
        seconds = TURNS.clock() - started
        forward = passes.taken()
        replies = [_ended(row, ends) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
        # A row that has ended is in no pass any more, with ours; with others it is, and not counted.
        steps = sum(map(len, replies)) if not options else len(forward) * len(replies)
        if ours is not None:
            assert ours.statistics is not None
            assert ours.statistics.drafter_errors == 0
            steps = ours.statistics.steps
        return Answer(replies, seconds, forward[1:], steps)

    return answer


def _ended(reply: list[int], ends: Sequence[int]) -> list[int]:
    """A reply up to the token that ends it, that one included."""
    return next((reply[: i + 1] for i, token in enumerate(reply) if token in ends), reply)


def left_at_a_tie(model: Any, ids: torch.Tensor, expected: Sequence[int], reply: Sequence[int]) -> bool:
    """Whether `reply` leaves `expected` where plain's logits of both tokens are nearly equal.

    Args:
        ids: int64 `(length,)`, the prompt without padding.
    """
    place = next(i for i, (token, other) in enumerate(zip(reply, expected, strict=False)) if token != other)
    text = torch.cat([ids, torch.tensor(expected[:place], dtype=torch.long)])
    with torch.inference_mode():
        logits = model(text[None]).logits[0, -1]
    return abs(float(logits[expected[place]] - logits[reply[place]])) < TIE


def in_turns(
    answering: Mapping[str, Callable[[Any], Answer]], inputs: Sequence[Any], first: int
) -> list[dict[str, Answer]]:
    """What every method makes of all `inputs`, one after the other; method number `first` begins."""
    names = list(answering)
    first %= len(names)

    def answer_all(name: str) -> list[Answer]:
        return [answering[name](one) for one in inputs]

    answers = TURNS.run({name: partial(answer_all, name) for name in names[first:] + names[:first]})
    return [{name: answers[name][i] for name in names} for i in range(len(inputs))]


def measure(
    model: Any, tokenizer: Any, answering: Mapping[str, Callable[[Any], Answer]], warm: int, single: int
) -> dict[tuple[int, str], list[tuple[Any, dict[str, Answer]]]]:
    """(batch size, task) -> for each batch its inputs, and what every method made of them."""

    def encoded(texts: Sequence[str]) -> Any:
        return tokenizer(texts, return_tensors="pt", padding=True)

    # transformers refuses to speculate on batches.
    batching = {name: answer for name, answer in answering.items() if name != LOOKUP}
    measured: dict[tuple[int, str], list[tuple[Any, dict[str, Answer]]]] = {}
    chats = {task: [prompt(text) for text in texts] for task, texts in tasks(warm + 1 + single + BATCH).items()}
    warming = [text for texts in chats.values() for text in texts[:warm]]
    in_turns(answering, [encoded([text]) for text in warming], 0)
    # Other prompts: who repeats a question teaches that replies are repeated.
    in_turns(batching, [encoded([text for texts in chats.values() for text in texts[warm : warm + 1]][:BATCH])], 0)
    print("warm", flush=True)
    for turn, (task, texts) in enumerate(chats.items()):
        alone = [encoded([text]) for text in texts[warm + 1 : -BATCH]]
        measured[1, task] = list(zip(alone, in_turns(answering, alone, turn), strict=True))
        batch = [encoded(texts[-BATCH:])]
        measured[BATCH, task] = list(zip(batch, in_turns(batching, batch, turn), strict=True))
        print(task, flush=True)
    return measured


def summarize(
    model: Any, names: Sequence[str], measured: Mapping[tuple[int, str], Sequence[tuple[Any, Mapping[str, Answer]]]]
) -> list[dict[str, Any]]:
    """A row for each batch size, task and method.

    Raises:
        SystemExit: a reply differs from plain's, and not at a tie.
    """
    table: list[dict[str, Any]] = []
    for (count, task), batches in sorted(measured.items(), key=lambda item: item[0][0]):
        plain = [answers[PLAIN] for _, answers in batches]
        for name in names:
            if name not in batches[0][1]:
                continue
            own = [answers[name] for _, answers in batches]
            same, ties = 0, 0
            for (inputs, _), one, base in zip(batches, own, plain, strict=True):
                for row, (reply, expected) in enumerate(zip(one.replies, base.replies, strict=True)):
                    same += reply == expected
                    if reply != expected:
                        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
                        if not left_at_a_tie(model, ids, expected, reply):
                            raise SystemExit(f"{name}, {task}, batch {count}: another reply than plain's, at no tie")
                        ties += 1
            ratios = [base.seconds / one.seconds for one, base in zip(own, plain, strict=True)]
            tokens = [sum(map(len, one.replies)) for one in own]
            table.append(
                {
                    "batch": count,
                    "task": task,
                    "method": name,
                    "tokens/step": sum(tokens) / sum(one.steps for one in own),
                    "forward ms": 1e3 * median([seconds for one in own for seconds in one.forward]),
                    "tokens/s": sum(tokens) / sum(one.seconds for one in own),
                    "times plain": sum(one.seconds for one in plain) / sum(one.seconds for one in own),
                    "lowest": min(ratios),
                    "same": f"{same} of {count * len(own)}" + (f", {ties} at a tie" if ties else ""),
                }
            )
    return table


def main() -> None:
    """Parse, run, print, save."""
    every = [PLAIN, LOOKUP, *DRAFTERS, *SLOW]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a reply (default 64)")
    parser.add_argument("--prompts", type=int, default=3, help="single prompts a task (default 3); and a batch of 4")
    parser.add_argument("--warm", type=int, default=1, help="prompts a task to warm up with (default 1)")
    parser.add_argument("--only", nargs="+", choices=every, metavar="METHOD", help="beside plain")
    parser.add_argument("--all", action="store_true", help=f"also {'; '.join(SLOW)}")
    parser.add_argument("--out", type=Path, help="folder for the result files")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path(), padding_side="left")
    passes = Passes()
    passes.watch(model)
    names = [name for name in every if (name in given.only if given.only else given.all or name not in SLOW)]
    names = [PLAIN, *(name for name in names if name != PLAIN)]
    answering = {
        name: method(model, passes, given.tokens, Speculative(config=dict(config)))
        for name, config in (DRAFTERS | SLOW).items()
        if name in names
    }
    answering[PLAIN] = method(model, passes, given.tokens)
    answering[LOOKUP] = method(model, passes, given.tokens, prompt_lookup_num_tokens=10)
    answering = {name: answering[name] for name in names}
    # Around all pieces, for none to end the mode of another.
    with torch.inference_mode():
        measured = measure(model, tokenizer, answering, given.warm, given.prompts)
    table = summarize(model, names, measured)
    note = (
        f"SmolLM2-135M-Instruct in float32 on a CPU, greedy, up to {given.tokens} tokens a reply: {given.prompts} "
        f"prompts of each task alone, and {BATCH} in one batch. Methods take turns at every forward pass. Ratios are "
        "of all prompts together, lowest is a single one. Speeds are from end to end, the pass over the prompt "
        "included. A step is a forward pass of a sequence; forward ms is the median of a pass, those over prompts left "
        f"out. A reply that is not plain's left it where plain's logits of both tokens were within {TIE:g}."
    )
    show("Live decoding in generate", table, note)
    save("generate_live", {"note": note, "table": table}, given.out)
    page = markdown("Live decoding in generate", table, note)
    ((given.out or RESULTS) / "generate_live.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
