"""Which benchmarks mcseg knows: one file of facts each. Imports nothing, so that ``mcseg --help`` can list them at once."""

from pathlib import Path

_FACTS = Path(__file__).parent / "data" / "facts"


def benchmark_names() -> list[str]:
    """List the names of the benchmarks, sorted."""
    return sorted(path.stem for path in _FACTS.glob("*.toml"))


def facts_file(name: str) -> Path:
    """Return the path of a benchmark's facts, ``<name>.toml``; there is no such file for an unknown name."""
    return _FACTS / f"{name}.toml"
