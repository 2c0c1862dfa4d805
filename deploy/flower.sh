#!/bin/sh
# Flower: workers, tasks and queues in a browser. Messages hold ids only, so it shows ids only; still, whoever reaches it may
# revoke tasks and stop workers, hence loopback and a password. Everything is set by Flower's own variables: FLOWER_PORT,
# FLOWER_ADDRESS, FLOWER_BASIC_AUTH=name:password, FLOWER_URL_PREFIX, ...
#
# /metrics and /healthcheck answer without a password, with names and counts of tasks.
set -eu
unset FLOWER_UNAUTHENTICATED_API
if [ -z "${FLOWER_BASIC_AUTH:-}" ]; then
    password=$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
    export FLOWER_BASIC_AUTH="flower:$password"
    echo "Flower wants a password and FLOWER_BASIC_AUTH has none; for this start it is flower / $password" >&2
fi
export FLOWER_ADDRESS="${FLOWER_ADDRESS:-127.0.0.1}"
# Flower remembers 100,000 tasks unless told otherwise, in memory.
export FLOWER_MAX_TASKS="${FLOWER_MAX_TASKS:-10000}"
exec celery -A workers.app flower
