"""``python -m mcseg`` is the command ``mcseg``."""

from mcseg.run.main import main

if __name__ == "__main__":
    main()
