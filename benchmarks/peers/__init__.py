"""The race against other runtimes on the same cores: `race.py` is the command.

Every peer works in an environment of its own and is asked by lines of JSON (`protocol.py`), so a worker imports nothing of
this project but `protocol` and `shapes`, which need the standard library alone.
"""
