"""Which settings are fastest on this machine: what `mcv-run tune` does. May import `decoding` and `vision`."""
