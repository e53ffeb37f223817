"""Where a program is run: what lies in the current folder, and what the machine grants."""

import os
import subprocess
import sys

import pytest

from tests.packs import ROOT


@pytest.mark.parametrize("program", ["preprocessing/pack.py", "evaluations/evaluate.py"])
def test_modules_of_ours_in_the_current_folder(tmp_path, program):
    """A config.py and a common.py of the user do not take the place of ours."""
    for name in ("config.py", "common.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')", encoding="utf-8")
    command = [sys.executable, str(ROOT / program), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0 and "--batch-size" in done.stdout, done.stderr
