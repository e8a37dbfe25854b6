"""Teachers: everything that can turn a batch into targets for a student."""

from kdtrain.teachers.base import DenseTargets, Targets, Teacher, teacher_autocast
from kdtrain.teachers.build import build_teacher
from kdtrain.teachers.local import LocalTeacher

__all__ = ["DenseTargets", "LocalTeacher", "Targets", "Teacher", "build_teacher", "teacher_autocast"]
