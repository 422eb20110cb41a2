"""`Speculative`: the object that `model.generate(..., custom_generate=...)` is given."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from time import perf_counter
from typing import Any, Self

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from freedraft.integrations.guard import Guard
from freedraft.integrations.hf.acceptance import make_rule
from freedraft.integrations.hf.batches import pad_token, padded, row_criteria, row_processors
from freedraft.integrations.hf.drafting import Drafting
from freedraft.integrations.hf.loop import Loop
from freedraft.integrations.hf.recorder import Recorder, result
from freedraft.integrations.hf.reference import Reference, as_references
from freedraft.integrations.hf.refusals import check_request
from freedraft.integrations.hf.row import Row
from freedraft.integrations.hf.settings import GenerateSettings
from freedraft.integrations.hf.statistics import Statistics
from freedraft.integrations.hf.stopping import Stopping
from freedraft.integrations.hf.target import Target
from freedraft.integrations.hf.tokens import Tokens
from freedraft.integrations.hf.verification import Verification
from freedraft.integrations.sections import check_sections
from freedraft.plugins.base import Drafter, TakesReference
from freedraft.plugins.config import SECTIONS, Config, parse_config, validate_settings
from freedraft.plugins.pacing import compile_kernels, pacer_for
from freedraft.plugins.registry import drafter_from_config
from freedraft.retrieval.errors import ConfigError, InputError, UnsupportedError
from freedraft.retrieval.ragged import Int32


class Speculative:
    """Speculative decoding for `generate`, with a drafter that needs neither model nor training.

        speculative = Speculative()
        output = model.generate(**inputs, max_new_tokens=200, custom_generate=speculative)
        print(speculative.statistics)

    The output is that of plain `generate`: token for token with greedy decoding in float32, and with sampling drawn
    from the same random stream. Only an acceptance rule that is lossy, and asked for by name, changes that. Use one
    object for many calls: what the drafter shares between sequences stays. Calls from several threads are safe; the
    statistics are then those of the call that ended last.

    Args:
        drafter: the registered name of a drafter, or a `Drafter`; by default what `config` names.
        config: a configuration as `parse_config` takes it: a mapping, a JSON string, a YAML file's path, a `Config`.
        tokenizer: the model's; needed for `stop_strings`, because `generate` does not pass its own on.
        streamer: is given the prompt and then every token, because `generate` does not pass its own on.
        settings: the drafter's settings; they override those of `config`.

    Attributes:
        drafter: the drafter.
        statistics: of the last call, None before the first.
        totals: of all calls.

    Raises:
        ConfigError: unknown drafter, unknown setting, bad value, or both a drafter and a configuration.
    """

    def __new__(cls, *given: Any, **_: Any) -> Self:
        """Refuse to be called as an object is: `generate` calls what it is given with the model and the prompt."""
        if len(given) > 1:
            raise ConfigError("custom_generate: expected an object, Speculative(), and not the class Speculative")
        return super().__new__(cls)

    def __init__(
        self,
        drafter: str | Drafter | None = None,
        *,
        config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        **settings: Any,
    ) -> None:
        parsed = _merge(drafter, config, settings)
        check_sections(parsed)
        self._settings = validate_settings(GenerateSettings, parsed.sections.get("generate", {}), "generate")
        self.drafter = drafter_from_config(parsed) if drafter is None or isinstance(drafter, str) else drafter
        self.tokenizer = tokenizer
        self.streamer = streamer
        self.statistics: Statistics | None = None
        self.totals = Statistics()
        self._guard = Guard(self.drafter)
        self._pacer = pacer_for(self.drafter, parsed.sections.get("pacing", {}))
        if self._pacer is not None:
            # The whole step is timed here; and no step is to wait for a kernel.
            self._pacer.spills = False
            compile_kernels()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Speculative({type(self.drafter).__name__})"

    @property
    def pacing(self) -> dict[str, Any] | None:
        """What pacing has decided so far and why, as `Pacer.report` tells; None where drafts are not paced."""
        return None if self._pacer is None else self._pacer.report()

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        stop_strings: str | list[str] | None = None,
        reference: Reference | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode; called by `generate`, which has prepared the arguments.

        `stop_strings` is named here for `generate` to leave it to us, for its own way to it loses the tokenizer.

        Args:
            reference: a text that the output is expected to resemble, the file to be edited say: `generate(...,
                reference=text)`. A string, which needs the tokenizer, or token ids; or a list of them, one a prompt.

        Returns:
            What `generate` returns: int64 `(rows, length)`, or a `GenerateDecoderOnlyOutput`.

        Raises:
            UnsupportedError: a model or options that can't be decoded speculatively.
            InputError: an empty prompt, strings without a tokenizer, or not a reference a prompt.
        """
        started = perf_counter()
        check_request(model, input_ids, generation_config, model_kwargs)
        count = input_ids.shape[0]
        if count > 1 and self.streamer is not None:
            raise UnsupportedError(f"a streamer with a batch of {count} sequences: a streamer takes one")
        criteria = [*stopping_criteria, *self._stop_strings(stop_strings)]
        padding = pad_token(generation_config, criteria, count)
        statistics = Statistics(calls=1)
        rule = make_rule(self._settings, generation_config.do_sample)
        statistics.lossy = int(rule.lossy)
        target = Target(model, generation_config, model_kwargs, count)
        rows = []
        for i in range(count):
            recorder = Recorder(generation_config, target.windows)
            processors = row_processors(logits_processor, i, count, model)
            verification = Verification(rule, processors, recorder, input_ids.device)
            stopping = Stopping(row_criteria(criteria, count, model))
            rows.append(Row(Tokens(input_ids[i : i + 1]), verification, stopping, recorder, self.streamer))
        references = as_references(reference, count, self.tokenizer) if self._can_refer(reference) else []
        drafting = Drafting(self._guard, statistics, target.why_no_trees, self._pacer, references)
        prompts = _without_padding(input_ids, model_kwargs.get("attention_mask"))
        try:
            if self.streamer is not None:
                self.streamer.put(input_ids.cpu())
            Loop(target, rows, drafting, statistics, self._settings.max_draft).run(input_ids, prompts)
            if self.streamer is not None:
                self.streamer.end()
        finally:
            drafting.close()
            target.release()
            statistics.total_seconds = perf_counter() - started
            with self._lock:
                self.statistics = statistics
                self.totals = self.totals + statistics
        sequences = padded([row.tokens.committed() for row in rows], padding)
        return result([row.recorder for row in rows], sequences, target.cache)

    def _can_refer(self, reference: Reference | None) -> bool:
        if reference is not None and not isinstance(self.drafter, TakesReference):
            raise UnsupportedError(f"reference: {type(self.drafter).__name__} takes none; fusion does")
        return reference is not None

    def _stop_strings(self, stop_strings: str | list[str] | None) -> list[StoppingCriteria]:
        if not stop_strings:
            return []
        if self.tokenizer is None:
            raise InputError("stop_strings need the model's tokenizer: Speculative(..., tokenizer=tokenizer)")
        return [StopStringCriteria(tokenizer=self.tokenizer, stop_strings=stop_strings)]


def _merge(
    drafter: str | Drafter | None,
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
) -> Config:
    """One configuration from the arguments of `Speculative`."""
    own = parse_config({**settings, "drafter": drafter} if isinstance(drafter, str) else settings)
    if drafter is not None and config is not None:
        raise ConfigError(f"drafter {drafter!r} and config: give one of them; a configuration names its drafter itself")
    if drafter is not None and not isinstance(drafter, str):
        if isinstance(drafter, type) or not isinstance(drafter, Drafter):
            raise ConfigError(f"drafter: expected a name or a Drafter, got {drafter!r}")
        if own.settings:
            raise ConfigError(f"{', '.join(own.settings)}: settings are for a drafter that is given by name")
    if config is None:
        return own
    parsed = parse_config(config)
    sections = {name: {**parsed.sections.get(name, {}), **own.sections.get(name, {})} for name in SECTIONS}
    return Config(parsed.drafter, {**parsed.settings, **own.settings}, sections)


def _without_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[Int32]:
    masked = attention_mask is not None and attention_mask.shape == input_ids.shape
    rows = []
    for i, row in enumerate(input_ids):
        text = row[attention_mask[i].bool()] if masked and attention_mask is not None else row
        rows.append(text.cpu().numpy().astype(np.int32))
    return rows
