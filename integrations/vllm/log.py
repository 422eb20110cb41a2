"""Lines of ours in vLLM's own log."""

from __future__ import annotations

import logging


def log_like_vllm() -> None:
    """Give our logger vLLM's handlers and level; Python shows a library's lines only from warnings up."""
    ours, theirs = logging.getLogger("freedraft"), logging.getLogger("vllm")
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
