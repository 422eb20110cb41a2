"""freedraft in vLLM: `{"method": "custom_class", "model": "freedraft.integrations.vllm.Proposer", ...}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freedraft.integrations.vllm.proposer import Proposer

__all__ = ["Proposer"]


def __getattr__(name: str) -> Any:
    # The proposer is imported when vLLM asks for it: the plug-in in this package is loaded by every vLLM there is.
    if name == "Proposer":
        from freedraft.integrations.vllm.proposer import Proposer

        return Proposer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
