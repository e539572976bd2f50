"""The dialect of Ollama: bodies, routes, and how answers are written. May import the rest of the service."""
