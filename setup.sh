#!/usr/bin/env bash
# Create .venv and install what the programs, the quickstart and the tests need, at the versions of constraints.txt.
# Does nothing when .venv is up to date. PYTHON=python3.12 chooses the interpreter; CONSTRAINTS= (empty) installs the
# newest versions, for platforms that lack one of these.
set -euo pipefail
cd "$(dirname "$0")"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, $("$python" --version) was found; set PYTHON=/path/to/python3" >&2
    exit 2
}
constraints="${CONSTRAINTS-constraints.txt}"
if [ -n "$constraints" ] && [ ! -f "$constraints" ]; then
    echo "error: CONSTRAINTS=$constraints: there is no such file; leave it empty for the newest versions" >&2
    exit 2
fi
wanted() { cat requirements.txt requirements-quickstart.txt requirements-dev.txt ${constraints:+"$constraints"}; }
stamp=.venv/requirements.stamp
if [ -x .venv/bin/python ] && wanted | cmp -s - "$stamp"; then exit 0; fi
echo "Installing into .venv (once; the CUDA build of torch is large)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r requirements-dev.txt ${constraints:+-c "$constraints"} || {
    echo "error: pip failed, see above; if this platform lacks a version, try: CONSTRAINTS= bash setup.sh" >&2
    exit 1
}
wanted > "$stamp"
echo "Installed. Before the commands of the README:  source .venv/bin/activate"
