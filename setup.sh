#!/usr/bin/env bash
# Create .venv and install requirements.txt into it; does nothing when they are as they were at the last run.
set -euo pipefail
cd "$(dirname "$0")"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, $("$python" --version) was found; set PYTHON=/path/to/python3" >&2
    exit 2
}
stamp=.venv/requirements.stamp
if [ -x .venv/bin/python ] && cat requirements.txt requirements-dev.txt | cmp -s - "$stamp"; then exit 0; fi
echo "Installing into .venv (once; the CUDA build of torch is large)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
cat requirements.txt requirements-dev.txt > "$stamp"
