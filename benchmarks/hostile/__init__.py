"""Files as a stranger might give them: each module damages one kind, and reads the result the way a user would.

A kind is a function of a scratch folder that gives a `Draw`: with a random generator it writes one damaged file, says what is
wrong with it, and what reads it. `hostile_files.py` runs that in a process of its own. May import everything.
"""
