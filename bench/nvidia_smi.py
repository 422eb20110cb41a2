"""What nvidia-smi says of the machine's GPUs, for the head of a result file."""

from __future__ import annotations

import subprocess

QUERY = "name,driver_version,memory.total"


def described() -> str:
    """Name, driver version and memory of each GPU, a line each; or why they are not known."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
