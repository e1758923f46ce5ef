#!/bin/sh
# Makes the virtual environment $1 with all that serving needs but this package itself, in the versions of
# requirements.lock. $2: an index with other builds of torch than PyPI's.
set -eu
python3 -m venv "$1"
python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' |
  "$1/bin/pip" install ${2:+--extra-index-url} ${2:+"$2"} --constraint requirements.lock --requirement /dev/stdin
