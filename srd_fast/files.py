"""Files that are whole or not there, and what they hold in one number."""

import hashlib
import os
import shutil
from collections.abc import Container
from pathlib import Path


def content_digest(path: Path, suffixes: Container[str] | None = None) -> str | None:
    """Content hash of a file, or of all files below a folder (with one of `suffixes`); None if there is none."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [f for f in files if suffixes is None or f.suffix in suffixes]
    if not files:
        return None
    state = hashlib.blake2b(digest_size=16)
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        state.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as f:
            while block := f.read(1 << 22):
                state.update(block)
    return state.hexdigest()


def temporary_path(target: Path) -> Path:
    """A hidden name beside `target` for work in progress, to be renamed to it."""
    return target.with_name(f".{target.name}.partial")


def write_text(target: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part."""
    temporary = temporary_path(target)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(finished: Path, target: Path) -> None:
    """Move a finished folder to `target`, in the place of an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(finished, target)
