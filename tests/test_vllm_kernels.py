"""No request waits for a kernel: the proposer's are compiled when it is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_stand_in import OUTSIDE

CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"pacing": "off"},
    {"drafter": "suffix_automaton"},
    # Which drafts nothing in the rehearsal.
    {"drafter": "suffix_automaton", "min_expected": 4.0},
    {"drafter": "prompt_lookup", "pacing": "on"},
    {"recycling": True},
    {"drafters": {"jacobi": {}, "lookahead": {}}},
    {"drafter": "token_recycling"},
]


@pytest.fixture(scope="module")
def compiled_late() -> dict[str, Any]:
    """In processes of their own: in this one, other tests have compiled them. They share the imports."""
    ran = subprocess.run(
        [sys.executable, "late_kernels.py", json.dumps(CONFIGURATIONS)],
        cwd=Path(__file__).parent,
        env={name: value for name, value in os.environ.items() if name not in OUTSIDE},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Shown by pytest where a test fails.
    print(ran.stderr)
    return dict(zip(map(str, CONFIGURATIONS), json.loads(ran.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_kernels_are_compiled_before_the_first_request(compiled_late: dict[str, Any], options: dict[str, Any]) -> None:
    assert compiled_late[str(options)] == []
