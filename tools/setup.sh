#!/bin/sh
# Creates .venv, or updates it if its inputs have changed. `make` calls this script from the repository root.
#
#   PYTHON   the Python to use; default: the first supported one of python3, python3.11 … python3.14
#   TORCH    "pinned": torch and triton from constraints.txt; "own": the torch that PYTHON already has
#
# .venv stores both values, which later calls use by default.
set -eu

say() { printf 'kvgather: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

[ -f pyproject.toml ] || fail "run this from the repository root, where pyproject.toml is"
[ -w . ] || fail "this folder cannot be written to, and .venv belongs in it: make a clone where you may write"

stored() { sed -n "$1p" .venv/chosen 2>/dev/null || true; }
torch=${TORCH:-$(stored 1)}
torch=${torch:-pinned}
case $torch in pinned|own) ;; *) fail "TORCH=$torch is neither 'pinned' nor 'own'" ;; esac

extras=book,notebooks,serving,test
! command -v nvidia-smi >/dev/null 2>&1 || extras=$extras,nvidia

# The key contains the folder because a moved clone must be installed again.
key=$({ pwd; echo "$torch $extras"; cat pyproject.toml constraints.txt tools/setup.sh; } | cksum)
python=$(stored 2)
if [ "$key" = "$(cat .venv/ready 2>/dev/null)" ] && [ "${PYTHON:-$python}" = "$python" ] &&
    .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

# If PYTHON is set, it is the only candidate.
if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
else
    set -- ${python:+"$python"} python3 python3.11 python3.12 python3.13 python3.14
fi
python=
for candidate in "$@"; do
    if supported "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    candidate=${PYTHON:-python3}
    version=$("$candidate" --version 2>&1) || version="no $candidate"
    fail "needs Python 3.11 to 3.14, and found $version. Install one, or name it: make lab PYTHON=/path/to/python3.12"
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$("$python" --version) lacks its venv module (on Debian and Ubuntu: apt-get install python3-venv)"
if [ "$torch" = own ]; then
    "$python" -c 'import torch' 2>/dev/null ||
        fail "TORCH=own needs a torch in $python, and it has none. Name the Python that has one with PYTHON="
fi

# Another mode, another version of Python or a missing Python requires a new environment; otherwise .venv is updated.
new_version=$("$python" -c 'import sys; print(*sys.version_info[:2])')
old_version=$(.venv/bin/python -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null) || old_version=none
if [ "$new_version" != "$old_version" ] || [ "$torch" != "$(stored 1)" ]; then
    say "creating .venv with $("$python" --version)"
    if [ "$torch" = own ]; then
        "$python" -m venv --clear --system-site-packages .venv
    else
        "$python" -m venv --clear .venv
    fi
fi
rm -f .venv/ready
printf '%s\n' "$torch" "$python" >.venv/chosen

say "installing into .venv (the first time takes a few minutes)"
# A terminal shows pip's progress; a log contains errors only.
quiet=--progress-bar=on
[ -t 1 ] || quiet=-qq
install() { .venv/bin/python -m pip install $quiet --disable-pip-version-check "$@"; }
# Without build isolation, so that constraints.txt pins the build backend too.
install -c constraints.txt hatchling editables
if [ "$torch" = own ]; then
    # --system-site-packages does not include packages of a PYTHON that is itself a virtual environment.
    folder=$("$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
    printf '%s\n' "$folder" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/own-torch.pth"
    say "using torch $(.venv/bin/python -c 'import torch; print(torch.__version__)') from $folder"
    grep -vE '^(torch|triton)==' constraints.txt >.venv/constraints.txt
    .venv/bin/python tools/requirements.py "$extras" >.venv/requirements.txt
    install -c .venv/constraints.txt -r .venv/requirements.txt
    install --no-deps --no-build-isolation -e .
else
    install -c constraints.txt --no-build-isolation -e ".[$extras]"
fi
printf '%s\n' "$key" >.venv/ready
