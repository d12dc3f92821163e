"""The sentence for a misspelt name: what was given, the nearest right one, and all there are."""

from collections.abc import Iterable

from rapidfuzz import process


def unknown_name(kind: str, given: object, known: Iterable[str], listed: bool = True) -> str:
    """'unknown KIND GIVEN; did you mean X? Known: ...' with the nearest name if one is near, and all if `listed`."""
    names = sorted(known)
    match = process.extractOne(str(given), names, processor=str.lower, score_cutoff=60)
    hint = f"; did you mean {match[0]!r}?" if match else "."
    everything = f" Known: {', '.join(names)}" if listed else ""
    return f"unknown {kind} {given!r}{hint}{everything}"
