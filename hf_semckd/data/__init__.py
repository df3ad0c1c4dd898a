"""Datasets and collators for a teacher and a student that read the same samples."""

from .columns import TeacherStudentCollator
from .views import RepeatableViews

__all__ = ["RepeatableViews", "TeacherStudentCollator"]
