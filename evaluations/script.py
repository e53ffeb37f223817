"""Starts a program of this folder that was run as a file again as a module of the project (`python -m`).

Imported by its bare name: the folder of a script is the first place where Python looks for modules.
"""

import os
import sys

_folder, _file = os.path.split(os.path.abspath(sys.argv[0]))
_root, _package = os.path.split(_folder)
os.environ["PYTHONPATH"] = os.pathsep.join([_root, *filter(None, [os.environ.get("PYTHONPATH")])])
os.execv(sys.executable, [sys.executable, "-P", "-m", f"{_package}.{_file.removesuffix('.py')}", *sys.argv[1:]])
