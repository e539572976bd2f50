"""Conversations, in memory and on disk. May import all rooms but `command`."""
