#!/usr/bin/env bash
# Format, lint, types, recorded reference values and tests, in the project's own .venv. --all adds the slow tests; further
# arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
bash setup.sh
marks="not slow and not gpu"
if [ "${1:-}" = "--all" ]; then marks="not gpu"; shift; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "error: not formatted: .venv/bin/ruff format ." >&2; exit 1; }
.venv/bin/mypy --no-error-summary
.venv/bin/python -m tests.reference tests/data
.venv/bin/python -m pytest -m "$marks" "$@"
