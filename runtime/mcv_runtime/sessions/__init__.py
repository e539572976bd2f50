"""ONNX Runtime's sessions: which provider, how many threads, open at the same time or in turn. May import `bundle`."""
