"""Batches: rows of folders, lines, tables and archives, and their answers on disk. May import `request` and what it may."""
