"""`mcv-run`: questions, conversations and batches in a terminal. May import everything; nothing imports it."""
