#!/bin/sh
# Healthy is a worker of this host that answers through the broker: it proves that the process lives, reads its messages and
# reaches Redis. A worker's name ends in the name of its host, which in a container is the container.
set -eu
exec python -c '
import socket, sys
from workers.app import app
found = app.control.inspect(timeout=10.0, limit=1, pattern=f"*@{socket.gethostname()}", matcher="glob").ping()
sys.exit(0 if found else "no worker of this host answers")
'
