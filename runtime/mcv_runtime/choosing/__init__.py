"""Which token comes next: sampling, constraints, stop strings, beams, prompt lookup. May import `text`."""
