"""How much memory this process has used at most."""

import resource
import sys


def peak_rss_mb() -> float:
    """Peak resident memory of the process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
