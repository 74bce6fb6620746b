#!/bin/sh
# Installs Debian's Chromium and its driver for tests/browser/ if this runs as root and apt-get exists: no prompt appears.
# On other machines the browser tests are skipped, with the reason.
set -eu

[ "${BROWSER:-chromium}" != none ] || exit 0
! { command -v chromium && command -v chromedriver; } >/dev/null 2>&1 || exit 0
{ [ "$(id -u)" = 0 ] && command -v apt-get; } >/dev/null 2>&1 || exit 0

echo "kvgather: installing chromium for the browser tests (BROWSER=none leaves it out)" >&2
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install --yes --no-install-recommends chromium chromium-driver; } >"$log" 2>&1 </dev/null; then
    tail -n 3 "$log" >&2
    echo "kvgather: the installation failed; the browser tests will be skipped" >&2
fi
rm -f "$log"
