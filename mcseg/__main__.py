"""``python -m mcseg`` is the command ``mcseg``."""

from mcseg.cli import main

if __name__ == "__main__":
    main()
