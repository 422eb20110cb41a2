"""The speculator of vLLM's V2 runner: drafts for every request on the GPU, where its tokens are.

Importing this imports vLLM's V2 classes, torch and numba.cuda.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from freedraft.integrations.vllm.gpu.arrays import Streams, as_array, select_device
from freedraft.integrations.vllm.gpu.install import has_peers
from freedraft.integrations.vllm.gpu.settings import gpu_settings
from freedraft.plugins.indexes import open_segments
from freedraft.retrieval.cuda.corpus_on_gpu import DeviceCorpus
from freedraft.retrieval.cuda.on_gpu import DeviceScan
from freedraft.retrieval.cuda.step import PreparedStep, prepared_step

logger = logging.getLogger("freedraft")


class ScanSpeculator(BaseSpeculator):
    """Drafts by an exhaustive scan of each request's tokens, and from indexes if any are named.

    Of a request it keeps between steps where its text is in the indexes, and sees when a slot has changed its owner. A
    step is one launch, and one more for each segment of an index; nothing waits for the device and nothing is
    allocated. Every rank of a tensor-parallel group computes the same drafts, as the V2 runner wants.

    Attributes:
        drafts: int64 `(max_num_reqs, K)` on the device; the last step's drafts.
        probability: float32 `(max_num_reqs, K)` on the device; 0 where there is no draft but a filler.
        counts: int32 `(max_num_reqs,)` on the device; drafted tokens a request.
        errors: steps that failed and were answered with fillers.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        """Allocate everything and compile the kernels.

        Raises:
            ConfigError: bad settings.
            CorpusIndexError: an index is missing or damaged, was built with another tokenizer, or has tokens that the
                model does not have.
            CapacityError: the device has too little free memory for the indexes.
        """
        settings = gpu_settings(vllm_config.additional_config["freedraft"])
        self.rules = settings.rules
        self.vllm_config = vllm_config
        self.speculative_config = vllm_config.speculative_config
        self.device = device
        self.req_states = req_states
        self.num_speculative_steps = int(self.speculative_config.num_speculative_tokens)
        self.errors = 0
        self._has_peers = has_peers(vllm_config)
        select_device(device)
        slots, width = req_states.all_token_ids.gpu.shape
        self._scan = DeviceScan(slots, width, threads=8 if device.type == "cpu" else 256)
        self._corpus: DeviceCorpus | None = None
        if segments := open_segments(settings.index, settings.tokenizer):
            vocabulary = int(vllm_config.model_config.get_vocab_size())
            self._corpus = DeviceCorpus(segments, slots, slots, settings.index_min_match, vocabulary)
        self._streams = Streams(device)
        self._rows = torch.zeros(slots, dtype=torch.int64, device=device)
        self._active = torch.zeros(slots, dtype=torch.int32, device=device)
        self.drafts = torch.zeros(slots, self.num_speculative_steps, dtype=torch.int64, device=device)
        self.probability = torch.zeros(slots, self.num_speculative_steps, dtype=torch.float32, device=device)
        self.counts = torch.zeros(slots, dtype=torch.int32, device=device)
        self._views: dict[int, tuple[tuple[Any, ...], tuple[Any, ...]]] = {}
        self._addresses = self._current_addresses()
        self._step = self._prepared_step()
        # The first launch compiles what is not yet compiled; the row that it drafts for is inactive.
        self._launch(1, self._rows, self._active, self.num_speculative_steps)
        logger.info(
            "freedraft: drafting on the GPU in the place of vLLM's n-gram kernel: %d requests of %d tokens, %d drafts, "
            "%d MiB of indexes",
            slots,
            width,
            self.num_speculative_steps,
            0 if self._corpus is None else self._corpus.bytes >> 20,
        )

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """There is no draft model whose graph could be captured."""

    def capture(self) -> None:
        """Likewise."""

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        *_: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **__: Any,
    ) -> torch.Tensor:
        """Draft for the requests of a batch; returns before it is done.

        Args:
            input_batch: `num_reqs` and `idx_mapping`, int64 `(num_reqs,)` on the device: each request's slot.
            attn_metadata: ignored, as all that is not named here.
            slot_mappings: ignored.
            last_hidden_states: ignored.
            aux_hidden_states: ignored.
            num_sampled: `(num_reqs,)`, 0 for a request that is still in its prompt: it gets no draft.
            num_rejected: ignored; `total_len` counts the committed tokens only.
            last_sampled: int64 `(max_num_reqs, 1)`, what a failed step is answered with.
            dummy_run: do no work.
            num_speculative_tokens: draft no more than this; None = K.

        Returns:
            int64 `(num_reqs, K)` on the device, valid until the next call; after a draft, the last token again.
        """
        requests = input_batch.num_reqs
        drafts = self.drafts[:requests]
        if dummy_run:
            return drafts.zero_()
        try:
            wanted = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
            self._launch(requests, input_batch.idx_mapping, num_sampled, wanted)
        except Exception:
            if self._has_peers:
                raise
            self.errors += 1
            if self.errors == 1:
                logger.exception("freedraft: drafting on the GPU failed; decoding goes on without drafts (logged once)")
            drafts.copy_(last_sampled.view(-1)[input_batch.idx_mapping[:requests], None].expand_as(drafts))
        return drafts

    def _launch(self, requests: int, slots: torch.Tensor, sampled: torch.Tensor, wanted: int) -> None:
        budget = min(max(0, wanted), self.num_speculative_steps)
        addresses = self._current_addresses()
        if addresses != self._addresses:
            # Nothing that points to the old arrays may stay, should this fail.
            self._step = None
            self._views.clear()
            self._step = self._prepared_step()
            self._addresses = addresses
        if self._step is None or not (
            can_stand_in(slots, self._rows, requests) and can_stand_in(sampled, self._active, requests)
        ):
            slots = self._rows[:requests].copy_(slots[:requests])
            sampled = self._active[:requests].copy_(sampled[:requests])
        if self._step is not None:
            self._step(requests, slots.data_ptr(), sampled.data_ptr(), budget, self._streams.handle())
            return
        rules = replace(self.rules, budget=budget)
        inputs, outputs = self._arrays(requests)
        stream = self._streams.current()
        self._scan.launch(inputs, outputs, rules, stream)
        if self._corpus is not None:
            self._corpus.launch(inputs, outputs, rules, stream)

    def _prepared_step(self) -> PreparedStep | None:
        inputs, outputs = self._arrays(len(self._rows))
        return prepared_step(self._scan, self._corpus, inputs, outputs, self.rules)

    def _arrays(self, requests: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The kernels' arguments, kept for each batch size: wrapping a tensor costs more than a launch."""
        arrays = self._views.get(requests)
        if arrays is None:
            states = self.req_states
            inputs = (states.all_token_ids.gpu, states.total_len.gpu, self._rows[:requests], self._active[:requests])
            outputs = (self.drafts[:requests], self.probability[:requests], self.counts[:requests])
            arrays = self._views[requests] = tuple(map(as_array, inputs)), tuple(map(as_array, outputs))
        return arrays

    def _current_addresses(self) -> tuple[int, int]:
        return self.req_states.all_token_ids.gpu.data_ptr(), self.req_states.total_len.gpu.data_ptr()


def can_stand_in(tensor: torch.Tensor, ours: torch.Tensor, requests: int) -> bool:
    """Whether kernels may read the first `requests` elements of `tensor` in the place of ours."""
    return (
        tensor.dtype is ours.dtype
        and tensor.device == ours.device
        and tensor.is_contiguous()
        and tensor.numel() >= requests
    )
