"""The script behind ``deepspeed megaptune/train.py --config configs/lama_11b.yaml``; same as ``megaptune train``."""

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # A script's own folder comes first on the path; ours would shadow other packages, the repository's root does not.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megaptune.cli import app


def main() -> None:
    """Hand the arguments to ``megaptune train``; the launcher puts ``--local_rank=N`` before them."""
    app(["train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
