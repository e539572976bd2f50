"""One KV memory, and the scheduler through which requests are read and decoded. May import what answers a request needs."""
