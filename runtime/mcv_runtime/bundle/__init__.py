"""A bundle: its folder, and the contract in `mcv.json`. Imports only `errors` and `files`."""

from mcv_runtime.bundle.folder import Bundle

__all__ = ["Bundle"]
