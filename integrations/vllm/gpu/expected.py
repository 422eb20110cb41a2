"""What the speculator relies on in vLLM's V2 runner, checked before it is used."""

from __future__ import annotations

import inspect
from importlib.metadata import packages_distributions, version
from typing import Any

KNOWN = "0.32 and 0.33"
ABSTRACT = {"init_cudagraph_manager", "capture", "propose"}
MADE_WITH = ["vllm_config", "device", "req_states"]
PROPOSE_READS = {"input_batch", "num_sampled", "dummy_run", "num_speculative_tokens"}
ATTRIBUTES = {
    "supports_mm_inputs": False,
    "draft_logits": None,
    "num_query_per_req": 1,
    "num_extra_query_per_req": 0,
}


def departures(original: type, vllm_config: Any, device: Any, req_states: Any) -> list[str]:
    """What is not as the speculator expects it, a phrase each; empty = nothing.

    Args:
        original: vLLM's own class.
        vllm_config: vLLM's configuration.
        device: the torch device of the tensors.
        req_states: the runner's state of all requests.
    """
    found = []
    base = original.__mro__[1] if len(original.__mro__) > 1 else object
    abstract = set(getattr(base, "__abstractmethods__", ()))
    if base.__name__ != "BaseSpeculator" or abstract != ABSTRACT:
        found.append(f"the base is {base.__name__} with the abstract methods {sorted(abstract)}")
    made_with = list(inspect.signature(original).parameters)
    if made_with != MADE_WITH:
        found.append(f"{original.__name__} is made with {made_with}")
    missing = PROPOSE_READS - set(inspect.signature(original.propose).parameters)  # type: ignore[attr-defined]
    if missing:
        found.append(f"propose has no {', '.join(sorted(missing))}")
    for name, value in ATTRIBUTES.items():
        if not hasattr(original, name) or getattr(original, name) != value:
            found.append(f"{name} is {getattr(original, name, 'missing')!r}")
    for name, axes in (("all_token_ids", 2), ("total_len", 1)):
        tensor: Any = getattr(getattr(req_states, name, None), "gpu", None)
        described = _described(tensor)
        if described != ("torch.int32", axes, True) or tensor.device.type != device.type:
            found.append(f"req_states.{name}.gpu is {described}")
    if not isinstance(getattr(vllm_config.speculative_config, "num_speculative_tokens", None), int):
        found.append("speculative_config has no num_speculative_tokens")
    return found


def installed_version() -> str:
    """vLLM's version, whichever distribution it came in."""
    names = packages_distributions().get("vllm", ["vllm"])
    return ", ".join(f"{name} {version(name)}" for name in sorted(set(names)))


def _described(tensor: Any) -> tuple[str, int, bool] | str:
    try:
        return str(tensor.dtype), tensor.ndim, bool(tensor.is_contiguous())
    except AttributeError:
        return f"a {type(tensor).__name__}"
