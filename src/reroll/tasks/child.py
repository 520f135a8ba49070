"""How child Python processes are started: same import path, nothing else of the parent.

multiprocessing's spawn would import the parent's main module again in every child: torch with it,
and a recipe without `if __name__ == "__main__"` would start itself once more. These children import
the one module they are told to and call its `main`.
"""

import json
import os
import sys

_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from {module} import main
main(*sys.argv[2:])
"""


def child_command(module: str, *arguments: str) -> list[str]:
    """Command line of a child that calls `main(*arguments)` of `module`."""
    path = json.dumps([str(entry) for entry in sys.path])
    return [sys.executable, "-c", _BOOT.format(module=module), path, *arguments]


def child_environment() -> dict[str, str]:
    """The parent's environment, with one hash seed for all children and one thread each.

    Generators and graders that iterate over sets would else differ from process to process, and
    a numeric library in each grader would start as many threads as there are cores.
    """
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **threads, "PYTHONHASHSEED": "0"}
