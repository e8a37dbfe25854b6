"""Teachers: everything that can turn a batch into targets for a student."""

from kdtrain.teachers.base import Teacher
from kdtrain.teachers.build import build_teacher
from kdtrain.teachers.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher", "build_teacher"]
