"""Sources of the teacher's rows: a model that runs beside the student, or a cache of one that was run before."""

from ..errors import DamagedFileError, StaleCacheError
from .absent import NoTeacher
from .beside import CacheBesideTeacher, at_work, from_cache
from .build import build_teacher_cache
from .cache import TeacherCache
from .collator import StepCollator
from .elsewhere import TeacherElsewhere
from .itself import SELF, OwnTeacher
from .live import LiveTeacher
from .opening import open_teacher_cache
from .privileged import PrivilegedTeacher
from .remote import RemoteTeacher, serve_teacher
from .roles import Roles, split_ranks
from .source import (
    HiddenRows,
    RowsOfSamples,
    TeacherRows,
    TeacherSource,
    distillation_loss_of_rows,
    labels_with_loss,
    rows_with_loss,
)
from .stores import CACHE_KINDS, Store, cache_kind_names, make_store, register_cache_kind
from .vllm_teacher import VLLMTeacher

__all__ = [
    "CACHE_KINDS",
    "SELF",
    "CacheBesideTeacher",
    "DamagedFileError",
    "HiddenRows",
    "LiveTeacher",
    "NoTeacher",
    "OwnTeacher",
    "PrivilegedTeacher",
    "RemoteTeacher",
    "Roles",
    "RowsOfSamples",
    "StaleCacheError",
    "StepCollator",
    "Store",
    "TeacherCache",
    "TeacherElsewhere",
    "TeacherRows",
    "TeacherSource",
    "VLLMTeacher",
    "at_work",
    "build_teacher_cache",
    "cache_kind_names",
    "distillation_loss_of_rows",
    "from_cache",
    "labels_with_loss",
    "make_store",
    "open_teacher_cache",
    "register_cache_kind",
    "rows_with_loss",
    "serve_teacher",
    "split_ranks",
]
