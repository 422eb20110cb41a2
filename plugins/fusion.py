"""Fusion: several texts, one calibrated draft."""

from __future__ import annotations

import logging
import operator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import ByteSize, Field

from freedraft.plugins import mixing
from freedraft.plugins.adjacency import NO_TOKEN, owners
from freedraft.plugins.base import Drafts, Feedback, FeedbackKind, Source
from freedraft.plugins.capture import open_capture
from freedraft.plugins.evidence import REACH
from freedraft.plugins.fusing import Drafted, Learnt, draft_batch, extend_batch, lend
from freedraft.plugins.fusing_trees import draft_trees
from freedraft.plugins.indexes import open_segments
from freedraft.plugins.indirect import no_successors
from freedraft.plugins.judging import NOT_STARTED, nothing_judged
from freedraft.plugins.mixing_file import read_mixer, write_mixer
from freedraft.plugins.other_drafters import OtherDrafters
from freedraft.plugins.own_text import OwnTextSettings
from freedraft.plugins.rankings import K, new_rankings, observe_batch
from freedraft.plugins.registry import rehearsed
from freedraft.plugins.responses import GENERATIONS, Responses, copy_text, end_of_text, nothing_taken_in
from freedraft.plugins.saving import Saving, full
from freedraft.plugins.slots import check_one_each
from freedraft.plugins.texts import NONE, Library, no_places, padded
from freedraft.plugins.threads import Threads
from freedraft.retrieval.automaton import SuffixAutomata
from freedraft.retrieval.edges import STATE_WORDS
from freedraft.retrieval.errors import ConfigError, InputError
from freedraft.retrieval.growth import BAD_SLOT, BAD_TOKEN
from freedraft.retrieval.lending import Lent
from freedraft.retrieval.ragged import Int32, Int64, as_offsets, as_tokens

logger = logging.getLogger("freedraft")

# Bytes of the arena that a token of earlier replies may take, a generous estimate: both generations together are to
# leave half of it to the sequences.
RESPONSE_BYTES = 128

# By kind of evidence.
SOURCES = np.array(
    [
        Source.OWN_TEXT,
        Source.RESPONSES,
        Source.CORPUS,
        Source.REFERENCE,
        Source.OWN_TEXT,
        Source.BY_PRODUCT,
        Source.BY_PRODUCT,
        Source.OWN_TEXT,  # what followed a follower, in whatever text: the context is the own one
    ],
    np.uint8,
)


class FusionSettings(OwnTextSettings):
    """Settings of `fusion`."""

    max_tokens: int = Field(24, ge=1, le=128, description="Tokens of a draft, at most.")
    shape: Literal["chain", "tree"] = Field(
        "chain",
        description="Draft the likeliest chain, or the likeliest tokens of a tree for a runtime that verifies trees.",
    )
    min_probability: float = Field(
        0.01, ge=0, le=1, description="End a draft where the probability that all of it is accepted falls below this."
    )
    scope: Literal["off", "engine"] = Field(
        "engine",
        description="Whose replies a sequence is drafted from: `off` = its own text alone; `engine` = also the other "
        "replies of this process, those still written included, whoever asked for them, what the model ranked in them, "
        "and which token came where another had come before. One user's reply can then speed up another's, and so "
        "betray by its timing that it exists: choose `off` where tenants must not learn that of each other.",
    )
    learnt: Path | None = Field(
        None,
        description="A file that `save_learnt` or `Fusion.save` wrote, to start from what the predictor had learnt by "
        "then; it has no text in it, though it betrays which tokens occurred. By default it starts from values "
        "by rule, which it leaves behind within some thousand tokens. May be missing if `save_learnt` names it too.",
    )
    save_learnt: Path | None = Field(
        None,
        description="A file to write what the predictor has learnt to, now and then and at the end of the process, for "
        "later processes that name it in `learnt`. Its folder must be there.",
    )
    recycling: bool = Field(
        False,
        description="Draft also from what the model itself ranked high when it last saw the same few tokens (token "
        "recycling); the runtime then has to collect its likeliest tokens at each verified position.",
    )
    drafters: dict[str, dict[str, Any]] = Field(
        {},
        description="Other drafters, by name with their settings, whose drafts are evidence as well: `jacobi: {}`, "
        "`lookahead: {}`, or one of a package of yours; the runtime then has to collect what they need to be told.",
    )
    index: str | list[str] | None = Field(
        None, description="Folder of an index, or several, as `freedraft index build` made them, to draft from as well."
    )
    tokenizer: str | None = Field(
        None,
        description="The model's tokenizer.json, its folder, or its name if it is in the Hugging Face cache. If given, "
        "indexes built with another tokenizer are refused; otherwise they must only agree with each other.",
    )
    response_tokens: int = Field(
        500_000,
        ge=1000,
        le=2**20,
        description="Tokens of earlier replies a generation holds, about; there are two. "
        "They live in `memory`, and never plan on more than half of it: with 64 MiB, about 130,000.",
    )
    threads: int = Field(
        1,
        ge=1,
        le=64,
        description="Threads that draft for large batches, from 64 sequences up. More than one pays where the runtime "
        "leaves cores idle while it waits for a GPU.",
    )
    capture: str | None = Field(
        None,
        description="Folder of an index that replies are written to when they have ended, whoever asked for them, for "
        "later processes that name it in `index`. Who can read the folder can read the replies. Needs `tokenizer`.",
    )
    capture_max_size: ByteSize = Field(
        ByteSize(2**29),
        ge=2**20,
        le=2**40,
        description="Bytes of that index; the oldest replies go when it is full.",
    )
    capture_tokens: int = Field(
        2**16,
        ge=2,
        le=2**22,
        description="Tokens of replies to gather in memory before they are written; every ten minutes, and at the end "
        "of the process, fewer are written too.",
    )

    def rehearsing(self) -> Self:
        """As `DrafterSettings.rehearsing`: nothing is captured, nor what was learnt kept."""
        drafters = {name: rehearsed(name, settings) for name, settings in self.drafters.items()}
        nothing = {"capture": None, "learnt": None, "save_learnt": None}
        return self.model_copy(update={**nothing, "drafters": drafters})


class Fusion:
    """Drafts the likeliest continuation by all the evidence there is, with a calibrated probability a token.

    Peers take the longest match, or the best score, or give each source a share. Here the nested contexts of all texts
    are mixed into one probability for each candidate (see `mixing`), learnt online from the tokens that are committed
    after a sequence's first draft; what came before that is its prompt, and so is what comes after `end_reply`. Texts:
    the sequence's own, other replies, the documents of indexes, and a reference that a request brings (`refer`).

    Raises:
        ConfigError: a file of `learnt` that is none; a `save_learnt` or a `capture` that cannot be, see `Saving` and
            `open_capture`.
        CorpusIndexError: an index is missing or damaged.
        TokenizerMismatchError: an index was built with another tokenizer than the model's, or than another index.
    """

    Settings: ClassVar[type[FusionSettings]] = FusionSettings
    calibrated: ClassVar[bool] = True
    """Its probabilities are what they say: pacing is on by default."""

    def __init__(self, settings: FusionSettings) -> None:
        self.settings = settings
        self.automata = SuffixAutomata(memory=int(settings.memory), max_length=settings.max_length)
        self.mixer = mixing.start()
        self.saving = None if settings.save_learnt is None else Saving(settings.save_learnt, self)
        self._take_up(settings.learnt)
        room = int(settings.memory) // (2 * GENERATIONS * RESPONSE_BYTES)
        self.responses = Responses(
            self.automata, min(settings.response_tokens, room) if settings.scope == "engine" else 0
        )
        self.capture = open_capture(
            settings.capture,
            settings.tokenizer,
            settings.scope,
            int(settings.capture_max_size),
            settings.capture_tokens,
        )
        # After it, which makes its folder an index: both may name the same one.
        self._segments = open_segments(settings.index, settings.tokenizer)
        self._corpora = padded([segment.automaton for segment in self._segments])
        self._damaged = np.zeros(1, np.int64)
        self._opened = 0
        self._places = no_places(len(self._segments))
        self._judged = nothing_judged(settings.max_tokens)
        self._taken_in = nothing_taken_in()
        self._successors = no_successors()
        self._table, self._rankings = new_rankings(settings.recycling, settings.max_tokens)
        self._others = OtherDrafters(settings.drafters, settings.scope)
        self.feedback_top_k = max(K, self._others.feedback_top_k)
        self._lent: Lent[tuple[Library, Learnt]] | None = None
        self._lent_parts: tuple[Any, ...] = ()
        self.threads = Threads(settings.threads)
        self.floor = 0.0
        """As `min_probability`, set by a runtime that paces: what is below would not be verified."""

    @property
    def feedback(self) -> frozenset[FeedbackKind]:
        """The target's rankings, if `recycling`, and what the `drafters` need."""
        return self._others.feedback | (frozenset({"top_k"}) if self.settings.recycling else frozenset())

    def open(self, prompts: Int32, offsets: Int64) -> Int64:
        """As `Drafter.open`; errors as `SuffixAutomata.open`."""
        prompts = as_tokens(prompts, "prompts")
        offsets = as_offsets(offsets, len(prompts))
        slots = self.automata.open(prompts[:0], np.zeros_like(offsets))
        most = int(slots.max(initial=-1)) + 1
        known = len(self._judged.started)
        if most > known:
            self._places = _grown(self._places, most)
            self._judged = _grown(self._judged, most)
            self._taken_in = _grown(self._taken_in, most)
            self._judged.started[known:] = NOT_STARTED
            self._taken_in.strand[known:] = NONE
            self._rankings = _grown(self._rankings, most)
        self._places.reference[slots] = NONE
        self._taken_in.strand[slots] = NONE
        self._judged.started[slots] = NOT_STARTED
        self._judged.last[slots] = NO_TOKEN
        self._judged.considered[slots] = 0
        self._judged.owner[slots] = owners(self.settings.scope, self._opened, len(slots))
        self._opened += len(slots)
        self._rankings.context[slots] = NO_TOKEN
        self._rankings.shown[slots] = 0
        try:
            self._others.open(slots)
            try:
                if len(prompts):
                    self.extend(slots, prompts, offsets)
            except Exception:
                self._others.close(slots)
                raise
        except Exception:
            self.automata.close(slots)
            raise
        return slots

    def refer(self, slots: Int64, texts: Int32, offsets: Int64) -> None:
        """Give sequences that have had no draft yet a text that their replies may resemble: a predicted output.

        Its first token is expected right after the prompt. An empty text is none.

        Args:
            slots: int64 `(n,)`.
            texts: int32, ragged, by `offsets` int64 `(n + 1,)`.

        Raises:
            InputError: a bad slot or token, or a sequence that has had a draft, or a reference.
            CapacityError: more texts than `memory` has room for.
        """
        texts = as_tokens(texts, "texts")
        offsets = as_offsets(offsets, len(texts), len(slots))
        self.automata.learning(slots)  # raises for a slot that is not open
        if (self._judged.started[slots] != NOT_STARTED).any() or (self._places.reference[slots] != NONE).any():
            raise InputError(f"slots: expected sequences without a draft or a reference so far, got {slots}")
        arrays = self.automata.arrays
        for slot, start, end in zip(slots, offsets[:-1], offsets[1:], strict=True):
            if end > start:
                # As if the text stood behind the prompt: then the end of the prompt leads into it.
                before = end_of_text(arrays.words, arrays.sequences, slot, REACH)
                text = np.concatenate([before, texts[start:end]])
                self._places.reference[slot] = self.automata.open(text, np.array([0, len(text)]))[0]
                arrays = self.automata.arrays
        self._others.refer(slots, texts, offsets)

    def extend(self, slots: Int64, tokens: Int32, offsets: Int64) -> None:
        """As `Drafter.extend`; errors as `SuffixAutomata.extend`."""
        tokens = as_tokens(tokens)
        offsets = as_offsets(offsets, len(tokens), len(slots))
        status = extend_batch(self._arrays(), self.settings.shape == "tree", slots, tokens, offsets)
        if status == BAD_SLOT:
            raise InputError(f"slots: expected open ones, got {slots}")
        if status == BAD_TOKEN:
            raise InputError(f"tokens: token ids must not be negative, got {int(tokens.min())}")
        if self.saving is not None:
            replying = self._judged.started[slots] != NOT_STARTED
            self.saving.learnt(self.mixer, int(np.diff(offsets)[replying].sum()))
        self._drop_damaged()
        self._others.extend(slots, tokens, offsets)
        if self.responses.full:
            self._rotate_replies()

    def draft(self, slots: Int64, budget: Int32) -> Drafts:
        """As `Drafter.draft`: one chain or tree a sequence."""
        check_one_each("budget", len(budget), slots)
        if self.settings.drafters:
            self.automata.learning(slots)  # raises for a slot that is not open
            self._others.propose(slots, budget)
        arrays = self._arrays()
        longest = self.settings.max_tokens
        least = max(self.settings.min_probability, self.floor)
        draft = draft_trees if self.settings.shape == "tree" else draft_batch

        def draft_rows(first: int, last: int) -> Drafts:
            drafted = _room(last - first, longest)
            status = draft(arrays, SOURCES, slots[first:last], budget[first:last], longest, least, drafted)
            if status == BAD_SLOT:
                raise InputError(f"slots: expected open ones, got {slots}")
            used = int(drafted.offsets[-1])
            return Drafts(
                drafted.tokens[:used],
                drafted.parents[:used],
                drafted.probability[:used],
                drafted.source[:used],
                drafted.offsets,
            )

        # A row writes to what is its slot's alone.
        parts = self.threads.share(len(slots), draft_rows)
        self._drop_damaged()
        drafts = parts[0] if len(parts) == 1 else Drafts.joined(parts)
        self._others.adopt(slots, drafts)
        return drafts

    def observe(self, slots: Int64, feedback: Feedback) -> None:
        """As `Drafter.observe`: rankings are kept until `extend` has told what was committed.

        Raises:
            InputError: a slot that is not open, or shapes that do not fit.
        """
        self.automata.learning(slots)  # raises for a slot that is not open
        self._others.observe(slots, feedback)
        if feedback.top_k is None or not self.settings.recycling:
            return
        ranked = np.ascontiguousarray(feedback.top_k, np.int32)
        if ranked.ndim != 2:
            raise InputError(f"feedback: expected top_k of shape (positions, k), got {ranked.shape}")
        offsets = as_offsets(feedback.offsets, len(ranked), len(slots))
        observe_batch(self._rankings, self._judged.considered, self._judged.parents, slots, ranked, offsets)

    def end_reply(self, slots: Int64) -> None:
        """As `KeepsReplies.end_reply`: the replies are a source for others now. Errors as `SuffixAutomata.close`."""
        self._keep_replies(slots)
        self._rotate_replies()
        self._others.end_reply(slots)

    def _keep_replies(self, slots: Int64) -> None:
        self.automata.learning(slots)  # raises for a slot that is not open, before anything is taken from it
        if len(np.unique(slots)) != len(slots):
            raise InputError(f"slots: expected distinct ones, got {slots}")
        if self.responses.enabled:
            self.responses.add(slots, self._judged.started[slots], self._taken_in)
        if self.capture is not None:
            arrays = self.automata.arrays
            self.capture.add(
                [
                    copy_text(arrays.words, arrays.sequences, slot, start)[:-1]  # without the separator
                    for slot, start in zip(slots, self._judged.started[slots], strict=True)
                    if start != NOT_STARTED
                ]
            )
        self._judged.started[slots] = NOT_STARTED
        self._judged.considered[slots] = 0

    def _rotate_replies(self) -> None:
        if self.responses.rotate(self._taken_in):
            self._places.others[:, 1] = self._places.others[:, 0]
            self._places.others[:, 0] = self.responses.beginning[0]

    def close(self, slots: Int64) -> None:
        """As `Drafter.close`, and `end_reply`."""
        self._keep_replies(slots)
        references = self._places.reference[slots]
        self._places.reference[slots] = NONE
        self.automata.close(np.concatenate([slots, references[references != NONE]]))
        self._others.close(slots)
        # After that, for a new generation needs memory, which these may have been the ones to take up.
        self._rotate_replies()

    def save(self, path: str | Path) -> None:
        """Write what the predictor has learnt to a file.

        No text is in it; which tokens occurred, by their ids modulo 4096, can be told from the maps and weights.
        """
        write_mixer(self.mixer, Path(path))

    def load(self, path: str | Path) -> None:
        """Take up what `save` wrote.

        Raises:
            InputError: not such a file, or one of another version's shapes.
        """
        self.mixer = read_mixer(Path(path))

    def _arrays(self) -> Lent[tuple[Library, Learnt]]:
        """All that the kernels work on. Most of it is replaced when it has to grow."""
        parts = (
            self.automata.arrays.sequences, self._corpora, self._places, self._judged, self._taken_in, self._successors,
            self._table, self._rankings, self._others.proposals, self.mixer,
        )  # fmt: skip
        if self._lent is None or not all(map(operator.is_, parts, self._lent_parts)):
            self._lent, self._lent_parts = lend(self._library(), self._learnt()), parts
        return self._lent

    def _library(self) -> Library:
        words, sequences = self.automata.arrays
        return Library(
            words,
            self.automata._pool,
            self.automata._next_page,
            words.reshape(-1, STATE_WORDS),
            words.reshape(-1, 2),
            sequences,
            self.responses.slots,
            self._corpora,
            self._damaged,
            self._places,
        )

    def _learnt(self) -> Learnt:
        return Learnt(
            self._judged,
            self._taken_in,
            self._successors,
            self._table,
            self._rankings,
            self._others.proposals,
            self.mixer,
        )

    def _take_up(self, learnt: Path | None) -> None:
        if learnt is None:
            return
        path = full(learnt)
        if self.saving is not None and path == self.saving.path and not path.exists():
            return  # the first process has nothing to start from
        try:
            self.load(path)
        except InputError as error:
            raise ConfigError(f"fusion: learnt: {error}") from error

    def _drop_damaged(self) -> None:
        """Go on without a segment that turned out to be damaged."""
        if self._damaged[0]:
            which = int(self._damaged[0]) - 1
            logger.warning("freedraft: %s; fusion goes on without it", self._segments[which].damaged())
            self._damaged[0] = 0
            automata = list(self._corpora)
            automata[which] = padded([])[0]
            self._corpora = tuple(automata)
            self._places.corpora[:, which] = 0


def _room(rows: int, longest: int) -> Drafted:
    space = rows * longest
    return Drafted(
        np.empty(space, np.int32),
        np.empty(space, np.int32),
        np.empty(space, np.float32),
        np.empty(space, np.uint8),
        np.empty(rows + 1, np.int64),
    )


def _grown(arrays: Any, slots: int) -> Any:
    """A tuple of arrays with a row a slot, with room for so many."""
    more = max(2 * len(arrays[0]), slots, 16) - len(arrays[0])
    return type(arrays)(*(np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)]) for array in arrays))
