"""Generate from the same inputs in several ways, in turns, and measure each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

PLAIN = "plain"

Generate = Callable[[Any, Mapping[str, Any], int], Any]
"""`(model, inputs, max_new_tokens) -> ids`, int64 `(1, length)`."""

Method = Callable[[], Generate]
"""Makes the `Generate` of one run: a drafter that remembers replies must not meet its own in the next run."""


@dataclass(frozen=True)
class Measured:
    """One method on one input.

    Attributes:
        tokens: new tokens.
        tokens_per_second: median over the repeats, the prompt's forward pass included.
        tokens_per_step: new tokens a forward pass.
        identical: whether the text is plain decoding's, token for token.
        speedup: tokens a second, divided by plain's.
        text: the answer.
    """

    input: str
    method: str
    tokens: int
    tokens_per_second: float
    tokens_per_step: float
    identical: bool
    speedup: float
    text: str

    def as_json(self) -> dict[str, Any]:
        """All but the text."""
        values = asdict(self)
        del values["text"]
        return values


def measure(
    model: Any,
    tokenizer: Any,
    name: str,
    prompt: str,
    methods: Mapping[str, Method],
    *,
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[str], None] = lambda method: None,
) -> list[Measured]:
    """Run every method on one prompt, `repeats` times in turns, so that a busy machine is busy for all of them.

    Args:
        methods: by name; `PLAIN` must be among them.
        progress: called with the method's name before each run.
    """
    inputs = encode(tokenizer, prompt)
    length = inputs["input_ids"].shape[1]
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    steps: dict[str, int] = {}
    replies: dict[str, list[int]] = {}
    for _ in range(repeats):
        for method, make in methods.items():
            progress(method)
            generate = make()
            with forward_passes(model) as passes:
                started = perf_counter()
                ids = generate(model, inputs, max_new_tokens)
                seconds[method].append(perf_counter() - started)
            steps[method] = len(passes)
            replies[method] = ids[0, length:].tolist()
    rates = {method: len(replies[method]) / statistics.median(seconds[method]) for method in methods}
    return [
        Measured(
            input=name,
            method=method,
            tokens=len(replies[method]),
            tokens_per_second=rates[method],
            tokens_per_step=len(replies[method]) / steps[method],
            identical=replies[method] == replies[PLAIN],
            speedup=rates[method] / rates[PLAIN],
            text=tokenizer.decode(replies[method], skip_special_tokens=True),
        )
        for method in methods
    ]


def encode(tokenizer: Any, prompt: str) -> Mapping[str, Any]:
    """Tokenise a user's message with the chat template, or as plain text where the model has none."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        encoded: Mapping[str, Any] = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded
    plain: Mapping[str, Any] = tokenizer(prompt, return_tensors="pt")
    return plain


def greedy(options: Callable[[], Mapping[str, Any]] = dict) -> Method:
    """Greedy decoding with further arguments of `generate`, made anew for each run."""

    def make() -> Generate:
        chosen = options()

        def generate(model: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> Any:
            return model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **chosen)

        return generate

    return make


def warm_up(model: Any, tokenizer: Any, methods: Iterable[Method]) -> None:
    """Run every method once on a short text, so that nothing is compiled while the clock runs."""
    inputs = encode(tokenizer, "one two three one two three one two")
    for make in methods:
        make()(model, inputs, 8)


@contextmanager
def forward_passes(model: Any) -> Iterator[list[None]]:
    """Count the model's forward passes: a list that grows by one at each."""
    passes: list[None] = []
    handle = model.register_forward_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        handle.remove()
