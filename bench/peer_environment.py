"""What bench/gptq_load.py and bench/gptq_vllm.py share. Such a script runs twice: here, and as
`--inside` by the python of the peer's own environment, which has no edgemed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser(description: str | None, environment: str) -> argparse.ArgumentParser:
    """Options of both runs. environment: a folder in bench/peers."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("checkpoint", type=Path)
    options.add_argument(
        "--peer",
        type=Path,
        default=Path(__file__).parent / "peers" / environment / "bin/python",
        help="python of the peer's environment",
    )
    options.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return options


def check(peer: Path) -> None:
    """Stop where the peer's environment is missing."""
    if not peer.is_file():
        sys.exit(f"{peer} is not there; make the environment as the head of this script says")
