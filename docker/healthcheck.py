"""Exits with 0 where the service of this container answers: `python healthcheck.py [PORT]`."""

import sys
import urllib.request

port = sys.argv[1] if len(sys.argv) > 1 else "8000"
with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
    sys.exit(answer.status != 200)
