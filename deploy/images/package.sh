#!/bin/sh
# Builds this package and puts it into the virtual environment $1, where dependencies.sh has been.
set -eu
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$1/bin/pip" wheel --no-deps --wheel-dir "$wheels" .
"$1/bin/pip" install --no-deps "$wheels"/*.whl
"$1/bin/pip" check
