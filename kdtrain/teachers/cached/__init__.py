"""Targets on disk: written once by `kdtrain cache`, trained from without a teacher.

`store.py` holds the files and what is in them, `manifest.py` what a cache was made from, `writing.py` asks the teacher,
and `teacher.py` is what the trainer sees.
"""
