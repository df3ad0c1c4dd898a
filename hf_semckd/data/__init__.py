"""Datasets and collators for a teacher and a student that read the same samples."""

from .collators import TeacherStudentCollator
from .views import RepeatableViews

__all__ = ["RepeatableViews", "TeacherStudentCollator"]
