"""freedraft for Hugging Face transformers: `model.generate(..., custom_generate=Speculative())`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freedraft.integrations.hf.speculative import Speculative
    from freedraft.integrations.hf.statistics import Statistics

__all__ = ["Speculative", "Statistics"]

_HOME = {"Speculative": "speculative", "Statistics": "statistics"}


def __getattr__(name: str) -> Any:
    # Lazy, so that importing a neighbour in this folder does not cost an import of torch.
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
