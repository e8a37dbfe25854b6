"""A teacher behind a server.

`server.py`, `pool.py`, `http.py` ask it, `replies.py` reads what it says, `teacher.py` is what the trainer sees, and
`probe.py` finds out what it really does.
"""
