#!/bin/sh
# Runs tests on versions of Triton other than the pinned one. `make test-triton` calls this script from the repository root.
#
#   $1       the versions, separated by spaces: "3.6.0 3.9.0"
#   $2 ...   arguments for pytest
#
# The script installs each version once, into a folder of .venv that precedes site-packages on Python's path. All versions
# share torch and every other package. tests/conftest.py stops unless the imported version is KVGATHER_TRITON.
set -eu

say() { printf 'kvgather: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

versions=$1
shift
[ -n "$versions" ] || fail 'name the versions: make test-triton VERSIONS="3.6.0 3.9.0"'

# All versions are installed before the first test run, so that a version that does not exist fails early.
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
    # An absolute path, because tests start processes in other folders.
    KVGATHER_TRITON=$version PYTHONPATH=$PWD/.venv/triton-$version${PYTHONPATH:+:$PYTHONPATH} \
        .venv/bin/python -m pytest "$@" || failed="$failed $version"
done
[ -z "$failed" ] || fail "tests failed on triton$failed"
