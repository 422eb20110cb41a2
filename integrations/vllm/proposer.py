"""The class that vLLM's speculative method `custom_class` loads in its workers."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np

from freedraft.integrations.guard import Guard
from freedraft.integrations.sections import check_sections
from freedraft.integrations.vllm.drafting import BatchDrafting
from freedraft.integrations.vllm.log import log_like_vllm
from freedraft.integrations.vllm.metrics import MetricsFile, PeriodicMetrics, folder
from freedraft.integrations.vllm.settings import VllmSettings
from freedraft.integrations.vllm.statistics import PeriodicLog, Statistics
from freedraft.integrations.vllm.tap import LogitsTap, MadeUpRankings, RankingSource
from freedraft.integrations.vllm.verification import restore_verification, shorten_verification
from freedraft.integrations.vllm.workarounds import mend_sampling_on_cpu
from freedraft.plugins.background import at_exit
from freedraft.plugins.base import Drafter
from freedraft.plugins.config import ENVIRONMENT_VARIABLE, Config, parse_config, validate_settings
from freedraft.plugins.pacing import Pacer, pacer_for
from freedraft.plugins.registry import drafter_from_config
from freedraft.retrieval.errors import ConfigError, UnsupportedError
from freedraft.retrieval.ragged import Int32

logger = logging.getLogger("freedraft")

# Whatever the engine's batch is like, a single short row perhaps: the kernels are the same.
REHEARSED_ROWS, REHEARSED_WIDTH = 2, 64


class Proposer:
    """Proposes drafts for every sequence of a vLLM worker's batch, in one pass.

    vLLM makes one a worker and calls `propose` after each step. Options are in `additional_config["freedraft"]`, or
    else in what the environment variable FREEDRAFT_CONFIG names, the same mapping or YAML file as everywhere.

    It fails open: an exception while drafting is counted, logged once, and answered with no draft.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Make the drafter and compile its kernels.

        Raises:
            ConfigError: an unknown drafter or setting, or a bad value.
            UnsupportedError: the model can't be decoded speculatively, or not with this parallelism, or vLLM can't tell
                the drafter what it asks for.
        """
        log_like_vllm()
        _refuse_recurrent(vllm_config.model_config)
        _refuse_parallel(vllm_config.parallel_config)
        mend_sampling_on_cpu()
        self._longest = int(vllm_config.speculative_config.num_speculative_tokens)
        self._idle = _tensor_parallel_rank() != 0
        self.statistics = Statistics()
        self._drafting: BatchDrafting | None = None
        self._metrics: PeriodicMetrics | None = None
        config = configuration(vllm_config.additional_config)
        check_sections(config)
        self.settings = validate_settings(VllmSettings, config.sections.get("vllm", {}), "vllm")
        (shorten_verification if self.settings.short_verification else restore_verification)()
        if self._idle:
            logger.info("freedraft: drafts come from tensor-parallel rank 0; this rank has nothing to do")
            return
        self._drafting = self._make(config, vllm_config, self.settings, rehearsing=False)
        self.statistics = self._drafting.statistics
        self._metrics = _open_metrics(vllm_config, self.statistics, self._drafting.pacer)
        if self._metrics is not None:
            at_exit(self._metrics.end, self)
        log = PeriodicLog(self.statistics, self.settings.log_interval, self._drafting.pacer)
        weakref.finalize(self, log.end)

    @property
    def pacing(self) -> dict[str, Any] | None:
        """What pacing has decided so far and why, as `Pacer.report` tells; None where drafts are not paced."""
        return None if self._drafting is None else self._drafting.pacing

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no draft model; vLLM's CPU worker asks all the same."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Int32,
        token_ids_cpu: Int32,
        slot_mappings: Any = None,
        **_: Any,
    ) -> list[list[int]]:
        """Draft for each row of the batch.

        Args:
            sampled_token_ids: each row's new tokens; none in a row that is still in its prompt.
            num_tokens_no_spec: int32 `(max_num_seqs,)`, the length of each row, the new tokens included.
            token_ids_cpu: int32 `(max_num_seqs, max_model_len)`, the rows; only read.
            slot_mappings: of each layer, an entry a token of the step's forward pass or more; only counted.

        Returns:
            A list a row, of 0 to `num_speculative_tokens` token ids.
        """
        if self._drafting is None:
            return [[] for _ in sampled_token_ids]
        started = perf_counter()
        most = _entries(slot_mappings)
        drafts = self._drafting.propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, most)
        self.statistics.seconds += perf_counter() - started
        return drafts

    def _make(self, config: Config, vllm_config: Any, settings: VllmSettings, rehearsing: bool) -> BatchDrafting:
        drafter = drafter_from_config(config, rehearsing=rehearsing)
        model = vllm_config.model_config
        drafting = BatchDrafting(
            drafter,
            rows=REHEARSED_ROWS if rehearsing else int(vllm_config.scheduler_config.max_num_seqs),
            longest=self._longest,
            width=REHEARSED_WIDTH if rehearsing else int(model.max_model_len),
            vocabulary=int(model.get_vocab_size()),
            settings=settings,
            # Which would withhold drafts, and kernels with them.
            pacer=None if rehearsing else pacer_for(drafter, config.sections.get("pacing", {})),
            tap=self._tap_for(drafter, config.drafter, rehearsing),
        )
        if not rehearsing:
            started = perf_counter()
            # Another one, so that neither text nor counts of the rehearsal stay in the first.
            _rehearse(self._make(config, vllm_config, VllmSettings(idle_steps=0), rehearsing=True))
            logger.info(
                "freedraft: drafter %s, up to %d tokens a step; kernels ready in %.1f s",
                config.drafter,
                self._longest,
                perf_counter() - started,
            )
        return drafting

    def _tap_for(self, drafter: Drafter, name: str, rehearsing: bool) -> RankingSource | None:
        """Where the rankings come from that a drafter asks for; None where it asks for none."""
        wanted = drafter.feedback - {"accepted"}
        if not wanted:
            return None
        k = Guard(drafter).top_k if "top_k" in wanted else 1
        if rehearsing:
            return MadeUpRankings(k)
        try:
            tap = LogitsTap(k)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"drafter {name!r} needs the target's {' and '.join(sorted(wanted))}: {error}; choose another drafter"
            ) from error
        weakref.finalize(self, tap.remove)
        return tap


def configuration(additional_config: Any) -> Config:
    """The configuration: `additional_config["freedraft"]`, else what FREEDRAFT_CONFIG names, else the defaults.

    Raises:
        ConfigError: not readable, or not a mapping.
    """
    given = additional_config.get("freedraft") if isinstance(additional_config, dict) else None
    if given is not None:
        if not isinstance(given, dict):
            raise ConfigError(f"additional_config: freedraft: expected a mapping of settings, got {given!r}")
        return parse_config(given)
    return parse_config(os.environ.get(ENVIRONMENT_VARIABLE) or None)


def _entries(slot_mappings: Any) -> int | None:
    """How many tokens one of these is for; None where there is none, or where a step is cut into micro-batches."""
    try:
        return int(next(iter(slot_mappings.values())).shape[0])
    except Exception:
        return None


def _rehearse(drafting: BatchDrafting) -> None:
    """Run a few steps on made-up text that repeats, so that every kernel is compiled before the first request.

    Sequences begin, are verified, go on with other text, and end. A drafter that fails here fails again, in earnest,
    and is logged then.
    """
    drafting.guard.silent = True
    tokens = np.zeros((REHEARSED_ROWS, REHEARSED_WIDTH), np.int32)
    tokens[:] = np.arange(REHEARSED_WIDTH) % 4
    length = np.full(REHEARSED_ROWS, 12, np.int32)
    for new in ([[], [3]], [[0], [0, 1]], [[1], [2]], [[2]], [[3]], [[0]]):
        length[: len(new)] += [len(row) for row in new]
        drafting.propose(new, length, tokens)
    length[0] += 5
    drafting.propose([[0]], length, tokens)
    drafting.propose([], length, tokens)


def _refuse_recurrent(model: Any) -> None:
    if getattr(model, "is_hybrid", False) or getattr(model, "is_attention_free", False):
        raise UnsupportedError(
            f"freedraft does not draft for {getattr(model, 'model', 'this model')}: it has recurrent layers (Mamba, "
            "Gated DeltaNet or the like), whose state vLLM can corrupt when a step without a draft follows an accepted "
            "one (vLLM issue 39273, https://github.com/vllm-project/vllm/issues/39273). Serve it without "
            "--speculative-config."
        )


def _refuse_parallel(parallel: Any) -> None:
    tensor, pipeline = (getattr(parallel, f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
    if getattr(parallel, "distributed_executor_backend", None) == "external_launcher" and tensor > 1:
        raise UnsupportedError(
            f"freedraft does not draft for {tensor} tensor-parallel ranks of an external launcher: each of them "
            "schedules by itself there, with the drafts of its own proposer, and freedraft drafts in rank 0 alone, so "
            "the ranks would run different batches. Let vLLM start the ranks (--distributed-executor-backend mp or "
            "ray), or serve without --speculative-config."
        )
    if pipeline > 1:
        raise UnsupportedError(
            f"freedraft does not draft for {pipeline} pipeline stages: vLLM has a batch in each of them, and shows a "
            "proposer these batches in turns. What became of a draft, and how long its step took, can't be told there. "
            "Use --tensor-parallel-size instead of --pipeline-parallel-size, or serve without --speculative-config."
        )


def _tensor_parallel_rank() -> int:
    try:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        return int(get_tensor_model_parallel_rank())
    except (ImportError, AssertionError):
        # Outside a worker there are no ranks.
        return 0


def _open_metrics(vllm_config: Any, statistics: Statistics, pacer: Pacer | None) -> PeriodicMetrics | None:
    path = folder()
    if path is None:
        logger.info("freedraft: no metrics: the plug-in was not loaded where vLLM started (see VLLM_PLUGINS)")
        return None
    parallel = vllm_config.parallel_config
    labels = {
        "model_name": str(getattr(vllm_config.model_config, "served_model_name", "")),
        "engine": str(getattr(parallel, "data_parallel_index", getattr(parallel, "data_parallel_rank", 0))),
    }
    try:
        return PeriodicMetrics(MetricsFile(path, labels), statistics, pacer)
    except Exception:
        logger.warning("freedraft: no metrics: can't write to %s", path, exc_info=True)
        return None
