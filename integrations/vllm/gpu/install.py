"""Offer freedraft's speculator in the place of vLLM's `NgramGPUSpeculator`; loads nothing until vLLM makes one.

vLLM imports that class when its V2 runner starts with an n-gram method, long after plug-ins are loaded and before any
plug-in knows the configuration. So the plug-in waits for the import, and the choice is made when the class is called,
with the configuration in hand.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

MODULE = "vllm.v1.worker.gpu.spec_decode.ngram.speculator"
CLASS = "NgramGPUSpeculator"
METHOD = "ngram_gpu"

logger = logging.getLogger("freedraft")


def install() -> None:
    """Replace the class when its module is imported, or now if it has been. Twice is as good as once."""
    module = sys.modules.get(MODULE)
    if module is not None:
        replace_class(module)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def replace_class(module: ModuleType) -> None:
    """Put a class that chooses into `module`, which keeps its own if it has none of that name."""
    original = getattr(module, CLASS, None)
    if not isinstance(original, type) or hasattr(original, "__freedraft__"):
        return

    def choose(cls: type, *arguments: Any, **options: Any) -> Any:
        return make_speculator(original, *arguments, **options)

    # What it makes is never an instance of itself, so Python calls no __init__ on the result.
    body = {"__new__": choose, "__doc__": original.__doc__, "__module__": MODULE, "__freedraft__": True}
    setattr(module, CLASS, type(CLASS, (original,), body))


def make_speculator(original: type, *arguments: Any, **options: Any) -> Any:
    """freedraft's speculator if it is configured and vLLM is as it is known to be; else `original`'s instance.

    Raises:
        ConfigError: freedraft is configured, and wrongly.
        CorpusIndexError: an index that it names is missing or damaged, or was built with another tokenizer.
        CapacityError: the indexes do not fit into the device's free memory.
        Exception: whatever else went wrong, where other ranks may have met nothing of it.
    """
    vllm_config = arguments[0] if arguments else options.get("vllm_config")
    if not is_configured(vllm_config):
        return original(*arguments, **options)
    from freedraft.integrations.vllm.gpu.expected import KNOWN, departures, installed_version
    from freedraft.integrations.vllm.log import log_like_vllm
    from freedraft.retrieval.errors import CapacityError, ConfigError
    from freedraft.retrieval.index.errors import CorpusIndexError

    log_like_vllm()
    try:
        unlike = departures(original, *arguments, **options)
        if unlike:
            logger.warning(
                "freedraft knows the V2 runner of vLLM %s; in this one, %s, %s: leaving vLLM's own n-gram drafter",
                KNOWN,
                installed_version(),
                "; ".join(unlike),
            )
            return original(*arguments, **options)
        from freedraft.integrations.vllm.gpu.speculator import ScanSpeculator

        return ScanSpeculator(*arguments, **options)
    except (ConfigError, CorpusIndexError, CapacityError):
        raise
    except Exception as error:
        if has_peers(vllm_config):
            raise
        logger.warning(
            "freedraft: no drafting on the GPU (%s: %s); leaving vLLM's own n-gram drafter",
            type(error).__name__,
            error,
            exc_info=True,
        )
    return original(*arguments, **options)


def is_configured(vllm_config: Any) -> bool:
    """Whether the method is `ngram_gpu` and `additional_config` has a key `freedraft`."""
    speculative = getattr(vllm_config, "speculative_config", None)
    additional = getattr(vllm_config, "additional_config", None)
    return getattr(speculative, "method", None) == METHOD and isinstance(additional, dict) and "freedraft" in additional


def has_peers(vllm_config: Any) -> bool:
    """Whether there are other tensor-parallel ranks: they must hold the same drafts, and know of no failure here."""
    return int(getattr(vllm_config.parallel_config, "tensor_parallel_size", 1)) > 1


class _Watcher(MetaPathFinder):
    """Finds one module, where it would be found anyway, and has its class replaced after it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        replace_class(module)
