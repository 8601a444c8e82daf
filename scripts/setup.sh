#!/bin/sh
# Creates .venv and installs the pinned dependencies and the package itself: scripts/setup.sh run|test
# scripts/setup.sh docs: .venv-docs with what builds the site, which reads the package's text and does not import it.
# The Makefile calls it when a stamp there is missing or older than the pins.
set -eu
cd "$(dirname "$0")/.."
level=$1
venv=.venv
[ "$level" != docs ] || venv=.venv-docs

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    first=${PYTHON:-python3}
    found=$("$first" --version 2>&1) || found="no $first that runs"
    echo "clicktrain needs Python 3.10 or newer, and found $found." \
        "Install one, or say where it is: make demo PYTHON=/path/to/python3.12" >&2
    return 2
}

# A folder without a working pip was interrupted half-way, or belonged to a Python that is gone.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Creating $venv with $("$python" --version)"
    if ! "$python" -m venv --clear "$venv"; then
        echo "$python cannot create a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
fi

quiet=
[ -t 1 ] || quiet=--quiet
pip() {
    "$venv/bin/python" -m pip "$@" $quiet --disable-pip-version-check --no-input
}

echo "Installing requirements/$level.txt into $venv (only when the pins change; the first time takes minutes)"
pip install -r "requirements/$level.txt"
if [ "$level" = docs ]; then
    touch "$venv/stamp-docs"
    exit
fi
pip install --no-deps --no-build-isolation --editable .

touch "$venv/stamp-run"
[ "$level" = run ] || touch "$venv/stamp-test"
