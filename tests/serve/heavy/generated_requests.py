"""Thousands of generated requests against the service's own description: no 5xx, and no answer that it does not describe.

python tests/serve/heavy/generated_requests.py [--requests 5000] [--seed 1]

Needs schemathesis in the Python that runs it; the server runs in this checkout's. `make test-clients` sees to both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from served import served


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server", default=sys.executable, help="Python that has mcv_serve")
    given = parser.parse_args()
    names = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
    with served(given.server, "--max-tokens", "16", "--deadline", "60", "--body-s", "20") as address:
        # every operation gets its share, over several runs with other seeds until there are enough
        seen, seed, failed = 0, given.seed, 0
        while seen < given.requests:
            report = Path(f"/tmp/schemathesis-{seed}.ndjson")
            done = subprocess.run(
                [
                    Path(sys.executable).parent / "schemathesis", "run", f"{address}/openapi.json", "--seed", str(seed),
                    "--checks", ",".join(names),
                    "--max-examples", "100", "--mode", "all", "--phases", "examples,coverage,fuzzing", "--continue-on-failure",
                    "--report", "ndjson", "--report-ndjson-path", report, "--suppress-health-check", "all",
                    "--exclude-path", "/metrics",
                ],
                capture_output=True, text=True,
            )  # fmt: skip
            now = report.read_text(encoding="utf-8").count('"status_code"') if report.exists() else 0
            if done.returncode or not now:
                failed = 1
                print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
                break
            seen, seed = seen + now, seed + 1
        print(json.dumps({"requests": seen, "seeds": seed - given.seed, "failed": bool(failed)}))
        return failed


if __name__ == "__main__":
    sys.exit(main())
