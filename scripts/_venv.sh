# Sourced by the scripts beside it: makes or reuses a virtual environment, and puts it first on PATH.
#
#   ensure_venv EXTRA     the extra of pyproject.toml to install: examples, or dev, which includes it
#
# VENV     where it is; .venv in the repository by default. A directory that this function did not make is used as it
#          stands: nothing is installed into an environment that somebody else looks after.
# PYTHON   the interpreter it is made from; python3 by default
# CONSTRAINTS   the versions it is filled with; constraints.txt of the repository by default

ensure_venv() {
  local extra=$1 venv python constraints mark want
  venv=${VENV:-$REPO/.venv}
  constraints=${CONSTRAINTS:-$REPO/constraints.txt}
  python=${PYTHON:-python3}
  mark=$venv/.made-by-shardckpt

  if [[ -e $venv && ! -e $mark ]]; then
    # Found, not imported, which would import torch.
    if ! "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("shardckpt"))'; then
      echo "$venv exists and does not have shardckpt: install it there, or set VENV to another place" >&2
      return 1
    fi
  else
    # What the environment is a function of. When none of it has changed, there is nothing to do.
    want=$("$python" -VV; cat "$REPO/pyproject.toml" "$constraints"; echo "$REPO")
    if [[ "$(cat "$mark/$extra" 2>/dev/null)" != "$want" && "$(cat "$mark/dev" 2>/dev/null)" != "$want" ]]; then
      echo "installing shardckpt[$extra] into $venv" >&2
      [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
      mkdir -p "$mark"
      rm -f "$mark/$extra"
      # The build backend comes from the same constraints, which a build environment of pip's own would not heed.
      "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        --constraint "$constraints" hatchling editables
      "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-build-isolation \
        --constraint "$constraints" --editable "$REPO[$extra]"
      printf '%s\n' "$want" > "$mark/$extra"
    fi
  fi
  export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
  unset PYTHONHOME
}
