#!/usr/bin/env bash
# The whole job on real images, on any machine: install, pack, train, sample, evaluate, report. --help shows the options.
set -euo pipefail
cd "$(dirname "$0")"
bash setup.sh
exec .venv/bin/python -m quickstart "$@"
