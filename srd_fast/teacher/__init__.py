"""Where teacher rows come from: today a live model."""

from .live import LiveTeacher, TeacherSource

__all__ = ["LiveTeacher", "TeacherSource"]
