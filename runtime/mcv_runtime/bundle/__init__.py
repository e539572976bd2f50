"""A bundle: its folder, and the contract in `mcv.json`. Imports only `errors` and `files`."""
