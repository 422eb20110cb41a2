"""What vLLM loads in each of its processes (entry-point group `vllm.general_plugins`), used or not: keep it light."""

from __future__ import annotations

import logging


def register() -> None:
    """Offer the GPU's speculator; let the API server show the proposer's metrics.

    Never raises: a plug-in's exception would end vLLM.
    """
    try:
        from freedraft.integrations.vllm.gpu.install import install

        install()
    except Exception:
        logging.getLogger("freedraft").warning("freedraft: no drafting on the GPU", exc_info=True)
    try:
        from freedraft.integrations.vllm.metrics import serve

        serve()
    except Exception:
        logging.getLogger("freedraft").warning("freedraft: no metrics on /metrics", exc_info=True)
