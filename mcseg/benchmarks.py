"""List the benchmarks, one file of facts each. Imports no library, to keep ``mcseg --help`` fast."""

from pathlib import Path

_FACTS = Path(__file__).parent / "data" / "facts"


def benchmark_names() -> list[str]:
    """List the names of the benchmarks, sorted."""
    return sorted(path.stem for path in _FACTS.glob("*.toml"))


def facts_file(name: str) -> Path:
    """Return the path of a benchmark's facts, ``<name>.toml``. The file does not exist if the name is unknown."""
    return _FACTS / f"{name}.toml"
