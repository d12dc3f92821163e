"""Where teacher rows come from: a model that runs beside the student, or a cache of one that was run once."""

from .build import build_teacher_cache, open_teacher_cache
from .cache import TeacherCache
from .collator import StepCollator
from .index import StaleCacheError
from .live import LiveTeacher
from .shards import DamagedFileError
from .source import (
    HiddenRows,
    TeacherRows,
    TeacherSource,
    distillation_loss_of_rows,
    labels_with_loss,
    rows_with_loss,
)
from .stores import make_store

__all__ = [
    "DamagedFileError",
    "HiddenRows",
    "LiveTeacher",
    "StaleCacheError",
    "StepCollator",
    "TeacherCache",
    "TeacherRows",
    "TeacherSource",
    "build_teacher_cache",
    "distillation_loss_of_rows",
    "labels_with_loss",
    "make_store",
    "open_teacher_cache",
    "rows_with_loss",
]
