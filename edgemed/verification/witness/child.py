"""The comparison in a process of its own: `python -m edgemed.verification.witness.child MODEL
[MEMORY [ADAPTERS]]` prints the result as JSON.

A problem is its last line on standard error, the fix behind a tab.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from edgemed.errors import EdgemedError
from edgemed.hardware.child_process import die_with_the_parent
from edgemed.models.checkpoint import open_checkpoint
from edgemed.verification.witness.comparison import compare, usual_memory


def main(arguments: Sequence[str]) -> None:
    """Print the result for a model directory. arguments: the directory, and perhaps how many bytes
    may be taken ('' for the usual) and the adapters, name -> PEFT directory, as JSON.
    """
    die_with_the_parent()
    memory = int(arguments[1]) if arguments[1:] and arguments[1] else usual_memory()
    adapters = json.loads(arguments[2]) if arguments[2:] else {}
    try:
        result = compare(open_checkpoint(arguments[0]), memory, adapters)
    except EdgemedError as error:
        print(f"error: {error.problem}\t{error.fix}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(result.to_json()))


if __name__ == "__main__":
    main(sys.argv[1:])
