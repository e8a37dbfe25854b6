"""Teachers: everything that can turn a batch into targets for a student."""

from kdtrain.teachers.base import DenseTargets, Targets, Teacher, teacher_autocast
from kdtrain.teachers.build import build_teacher, connect_teacher
from kdtrain.teachers.cached.teacher import CachedTeacher
from kdtrain.teachers.itself import SelfTeacher
from kdtrain.teachers.local import LocalTeacher
from kdtrain.teachers.served.teacher import ServedTeacher
from kdtrain.teachers.several import MixedTeacher, RoutedTeacher

__all__ = [
    "CachedTeacher",
    "DenseTargets",
    "LocalTeacher",
    "MixedTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "ServedTeacher",
    "Targets",
    "Teacher",
    "build_teacher",
    "connect_teacher",
    "teacher_autocast",
]
