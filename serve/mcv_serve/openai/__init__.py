"""The dialect of OpenAI: bodies, routes, and how answers are written. May import the rest of the service."""
