"""Names of the benchmarks and paths of their facts; without imports of mcseg, so that ``mcseg --help`` stays fast."""

from pathlib import Path

_FACTS = Path(__file__).parent / "data" / "facts"


def benchmark_names() -> list[str]:
    """List the names of the benchmarks, sorted."""
    return sorted(path.stem for path in _FACTS.glob("*.toml"))


def facts_file(name: str) -> Path:
    """Return the path of a benchmark's facts, ``<name>.toml``; it does not exist for an unknown name."""
    return _FACTS / f"{name}.toml"
