#!/bin/sh
# Writes requirements.txt anew: what a clean environment gets today. Run it at the root of the repository.
set -eu
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --constraint constraints.txt .
{
  sed '/^# /!d' deploy/images/requirements.txt
  echo '--constraint ../../constraints.txt'
  echo torch
  "$venv/bin/pip" freeze --exclude qwen-trm --exclude torch
} >"$venv/requirements.txt"
cp "$venv/requirements.txt" deploy/images/requirements.txt
