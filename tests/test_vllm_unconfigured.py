"""vLLM loads the plug-in in every process: where freedraft is not configured, it must change and write nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_stand_in import OUTSIDE

from freedraft.integrations.vllm import metrics

OURS = ("freedraft.plugins.fusion", "freedraft.integrations.vllm.proposer", "freedraft.integrations.vllm.tap")

ALONE = """
import json, os, sys, threading
written = []

def note(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(arguments[0]))
    if event in ("os.mkdir", "os.rename", "os.symlink", "socket.bind", "subprocess.Popen"):
        written.append(event)

sys.addaudithook(note)
with open(os.devnull, "w"):
    assert written == [os.devnull]  # it is seen
written.clear()
before, threads = dict(os.environ), threading.active_count()
from freedraft.integrations.vllm.plugin import register
register()
print(json.dumps({
    "loaded": list(sys.modules),
    "written": written,
    "variables": sorted(set(os.environ.items()) ^ set(before.items())),
    "threads": threading.active_count() - threads,
}))
"""

WITH_VLLM = """
import json, sys
from vllm.plugins import load_general_plugins
before = set(sys.modules)
load_general_plugins()
loaded = [name for name in sys.modules if name not in before]
from vllm.v1.sample import rejection_sampler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

def ours():
    owners = (GPUModelRunner, rejection_sampler, rejection_sampler.RejectionSampler)
    functions = [(name, value) for owner in owners for name, value in vars(owner).items()]
    return [n for n, f in functions if getattr(f, "__globals__", {}).get("__name__", "").startswith("freedraft")]

untouched = ours()
tap_loaded = "freedraft.integrations.vllm.tap" in sys.modules
from freedraft.integrations.vllm.tap import LogitsTap
tap = LogitsTap(1)
print(json.dumps({"loaded": loaded, "tap": tap_loaded, "ours": untouched, "with a tap": ours()}))
"""


def run(code: str, folder: Path, **variables: str) -> Any:
    """What a process without a configuration prints, JSON in its last line; `folder` is its home and its /tmp."""
    environment = {name: value for name, value in os.environ.items() if name not in OUTSIDE}
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(folder))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment, **places, "PYTHONDONTWRITEBYTECODE": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_plug_in_alone(tmp_path: Path) -> None:
    seen = run(ALONE, tmp_path)
    assert "freedraft.integrations.vllm.metrics" in seen["loaded"]
    assert not [name for name in seen["loaded"] if name.startswith((*OURS, "numba", "llvmlite", "torch", "vllm"))]
    assert seen["written"] == []
    assert [name for name, _ in seen["variables"]] == [metrics.OWN_FOLDER]
    assert seen["threads"] == 0
    assert list(tmp_path.iterdir()) == []


def test_vllms_runner_and_sampler_are_its_own(tmp_path: Path) -> None:
    seen = run(WITH_VLLM, tmp_path, VLLM_PLUGINS="freedraft")
    assert "freedraft.integrations.vllm.plugin" in seen["loaded"]
    assert not [name for name in seen["loaded"] if name.startswith((*OURS, "numba", "llvmlite"))]
    assert not seen["tap"]
    assert seen["ours"] == []
    assert seen["with a tap"] == ["_sample"]
    assert not list(tmp_path.rglob("*freedraft*"))
