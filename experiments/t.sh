cd /work/wt/hopper/experiments; TRITON_ALWAYS_COMPILE=1 PYTHONPATH=/tmp/t36/lib/python3.11/site-packages:/work/wt/hopper /work/wt/hopper/.venv/bin/python "$@" 2>&1
