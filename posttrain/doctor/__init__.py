"""What scripts/doctor.py looks at: each line is (state, what, found, next command).

Runs on Python 3.8 without any package, so that a machine that lacks everything is told what it lacks.
"""

OK, WARNING, FAULT = "ok", "warning", "FAULT"
GIB = 2**30
