#!/bin/sh
# Runs tests on several versions of PyTorch, each in an environment of its own under .matrix/ (not in git):
#   scripts/matrix.sh "2.6.0 2.14.1" [what pytest is given]
# An environment is made once (PyPI's builds of torch for Linux bring CUDA: gigabytes); delete it to renew it.
# The package is taken from this folder. docs/platforms.md says what was run where.
set -u
cd "$(dirname "$0")/.."
versions=$1
shift
python=${PYTHON:-python3}
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
# What the tests need, as pinned, but for torch and what follows its version.
grep -hvE '^(#|-r|$)|^(torch|triton|sympy|mypy|ruff|types-PyYAML)==' requirements/run.txt requirements/test.txt >"$pins"
failed=
for version in $versions; do
    folder=.matrix/torch-$version
    if [ ! -f "$folder/complete" ]; then
        echo "== making $folder"
        rm -rf "$folder"
        "$python" -m venv "$folder" &&
            "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
                "torch==$version" -r "$pins" &&
            touch "$folder/complete" || { failed="$failed $version(install)"; continue; }
    fi
    "$folder/bin/python" -c 'import platform, torch
print("== Python", platform.python_version(), "on", platform.system(), platform.machine(), "torch", torch.__version__)'
    PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -q -o "cache_dir=$folder/pytest" "$@" ||
        failed="$failed $version"
done
[ -z "$failed" ] || { echo "== failed:$failed"; exit 1; }
