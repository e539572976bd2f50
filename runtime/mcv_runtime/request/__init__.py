"""A request: its options, its limits, how it is prepared, and the answer it gets. May import `choosing`, `text`, `pictures`."""
