"""Exits with 0 where the service of this container answers: `python healthcheck.py [PORT]`.

It connects itself, whatever proxy the environment names for other addresses.
"""

import http.client
import sys

port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
try:
    connection.request("GET", "/healthz")
    sys.exit(connection.getresponse().status != 200)
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"http://127.0.0.1:{port}/healthz: {error}")
