#!/bin/sh
# Runs tests on other versions of Triton than the pinned one. `make test-triton` calls it from the repository root.
#
#   $1       the versions, separated by spaces: "3.6.0 3.9.0"
#   $2 ...   arguments for pytest
#
# Each version is installed once, into a folder of .venv that precedes site-packages on the path; torch and everything else
# are shared. tests/conftest.py refuses to run when another version than KVGATHER_TRITON was imported.
set -eu

say() { printf 'kvgather: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

versions=$1
shift
[ -n "$versions" ] || fail 'name the versions: make test-triton VERSIONS="3.6.0 3.9.0"'

# All are installed before the first test, so that a version that does not exist costs no test run.
for version in $versions; do
    case $version in
        [0-9]*.[0-9]*.[0-9]*) ;;
        *) fail "'$version' is not a full version such as 3.6.0" ;;
    esac
    folder=.venv/triton-$version
    if [ ! -d "$folder" ]; then
        say "installing triton $version into $folder"
        rm -rf "$folder.part"
        .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
            --target "$folder.part" "triton==$version" ||
            fail "triton $version cannot be installed for $(.venv/bin/python --version) on this machine"
        mv "$folder.part" "$folder"
    fi
done

failed=
for version in $versions; do
    say "tests on triton $version"
    # Absolute, because tests start processes in other folders.
    KVGATHER_TRITON=$version PYTHONPATH=$PWD/.venv/triton-$version${PYTHONPATH:+:$PYTHONPATH} \
        .venv/bin/python -m pytest "$@" || failed="$failed $version"
done
[ -z "$failed" ] || fail "tests failed on triton$failed"
