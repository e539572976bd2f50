"""Found by `optimum-cli` in the namespace package `optimum.commands.register`, which must have no `__init__.py`."""

from optimum.commands.export.base import ExportCommand

from mcv_export.optimum_command import ExportMcv

REGISTER_COMMANDS = [(ExportMcv, ExportCommand)]
