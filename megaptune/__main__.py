"""``python -m megaptune``."""

from megaptune.cli import main

if __name__ == "__main__":
    main()
