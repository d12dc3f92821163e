"""The sentence for a misspelt name: what was given, the nearest right one, and all there are."""

from collections.abc import Iterable, Mapping

from rapidfuzz import process


def unknown_name(
    kind: str, given: object, known: Iterable[str], listed: bool = True, synonyms: Mapping[str, str] | None = None
) -> str:
    """Make 'unknown KIND GIVEN; did you mean X? Known: ...', with a near name if there is one, and all if `listed`.

    synonyms: what other libraries call it -> the name here, which need not be in `known`.
    """
    names = sorted(known)
    meant = (synonyms or {}).get(str(given).lower().replace("-", "_"))
    if meant is None:
        match = process.extractOne(str(given), names, processor=str.lower, score_cutoff=60)
        meant = match[0] if match else None
    hint = f"; did you mean {meant!r}?" if meant else "."
    everything = f" Known: {', '.join(names)}" if listed else ""
    return f"unknown {kind} {given!r}{hint}{everything}"
