#!/bin/sh
# Makes the virtual environment $1 with everything but this package. $2: an index with other builds of torch than PyPI's.
set -eu
python3 -m venv "$1"
"$1/bin/pip" install ${2:+--extra-index-url} ${2:+"$2"} --requirement deploy/images/requirements.txt
