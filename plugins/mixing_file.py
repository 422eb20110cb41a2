"""The file of a mixer: an uncompressed `.npz` with its arrays, read without trust in who wrote it."""

from __future__ import annotations

import os
import threading
import zipfile
from pathlib import Path

import numpy as np

from freedraft.plugins.mixing import CORRECTED_LIMIT, LOWEST, RATE_LIMIT, Mixer, start, stretched_rates
from freedraft.retrieval.errors import InputError

# A member's header, on top of its array's bytes.
HEADER_BYTES = 1024
WEIGHT_LIMIT = 16.0
STORED = tuple(name for name in Mixer._fields if name != "stretched")  # which follows from the rates


def write_mixer(mixer: Mixer, path: Path) -> None:
    """Write `mixer` to `path`, all or nothing."""
    # Several drafters may be told to write the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **{name: array for name, array in mixer._asdict().items() if name in STORED})
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_mixer(path: Path) -> Mixer:
    """Read what `write_mixer` wrote; nothing in the file is run, and no more is read than a mixer takes.

    Raises:
        InputError: not such a file, cut off, changed, or of another version's shapes.
    """
    expected = start()
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            for name in STORED:
                if f"{name}.npy" not in sizes:
                    raise InputError(f"{path}: not a predictor that this version saved: it has no {name}")
                array = getattr(expected, name)
                if not sizes[f"{name}.npy"] <= array.nbytes + HEADER_BYTES:
                    raise InputError(f"{path}: {name}: {sizes[f'{name}.npy']} bytes are too many")
        with np.load(path, allow_pickle=False) as stored:
            loaded = {name: stored[name] for name in STORED}
    except InputError:
        raise
    # numpy, zipfile and zlib each have their own ways to say that a file is broken.
    except Exception as error:
        raise InputError(f"{path}: not a saved predictor: {error}") from error
    for name, array in loaded.items():
        like = getattr(expected, name)
        if array.shape != like.shape or array.dtype != like.dtype or not np.isfinite(array).all():
            raise InputError(
                f"{path}: {name}: expected finite {like.dtype} {like.shape}, got {array.dtype} {array.shape}"
            )
    rates = np.ascontiguousarray(np.clip(loaded["rates"], LOWEST, 1 - LOWEST))
    return Mixer(
        rates,
        stretched_rates(rates),
        np.ascontiguousarray(np.clip(loaded["observed"], 0, RATE_LIMIT)),
        np.ascontiguousarray(np.clip(loaded["weights"], -WEIGHT_LIMIT, WEIGHT_LIMIT)),
        np.ascontiguousarray(np.clip(loaded["token_weights"], -WEIGHT_LIMIT, WEIGHT_LIMIT)),
        np.ascontiguousarray(np.clip(loaded["correction"], 0, 1)),
        np.ascontiguousarray(np.clip(loaded["corrected"], 0, CORRECTED_LIMIT)),
        np.ascontiguousarray(np.clip(loaded["maps"], 0, 1)),
        np.ascontiguousarray(np.clip(loaded["mapped"], 0, CORRECTED_LIMIT)),
    )
