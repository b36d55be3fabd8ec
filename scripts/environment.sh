# Sourced by quickstart and test: leaves a Python environment active that holds this checkout and the known-good versions.
# An active virtual environment is used as it is found; otherwise .venv is created. A second call installs nothing.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

require_python() {
    if ! command -v "$1" >/dev/null || ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or newer is needed, but '$1' is $("$1" --version 2>&1 || echo 'not installed'): install it, or activate a virtual environment that has it" >&2
        exit 2
    fi
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
    # Python writes activate last: without it the folder is what a failed attempt left.
    if [ ! -f .venv/bin/activate ]; then
        require_python python3
        echo "Creating the virtual environment $root/.venv"
        if ! said="$(python3 -m venv .venv 2>&1)"; then
            rm -rf .venv
            echo "error: python3 cannot create a virtual environment (${said%%$'\n'*}): install its venv package (Debian, Ubuntu: apt install python3-venv), or activate an environment of your own" >&2
            exit 2
        fi
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi
require_python python

stamp="$VIRTUAL_ENV/.gkd_hf-installed"
wanted="$(cat setup.cfg pyproject.toml scripts/constraints.txt | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $root"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing the known-good versions of scripts/constraints.txt into $VIRTUAL_ENV (once; a few minutes)"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if ! python -m pip --version >/dev/null 2>&1; then
        echo "error: $VIRTUAL_ENV has no working pip: run '$VIRTUAL_ENV/bin/python -m ensurepip', or remove that folder and start again" >&2
        exit 2
    fi
    python -m pip install -qq "$(grep '^torch==' scripts/constraints.txt)"
    # compat: a plain path entry, which a folder of the same name as the package cannot hide
    python -m pip install -qq --constraint scripts/constraints.txt --config-settings editable_mode=compat --editable '.[test]'
    echo "$wanted" >"$stamp"
fi
