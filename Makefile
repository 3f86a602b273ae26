# make demo   the whole loop on a small model, with a report to look at
# make docs   the documentation as a site, in site/
# make test   every check, with the newest TRL, with the last one that has PPO, and some with the oldest versions
# make package   wheel and sdist in dist/, checked, and the wheel tried in an environment with nothing else
# All set up what they need, in .venv, .venv-ppo and .venv-oldest; PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
WORKERS ?= 2
PINS := pyproject.toml constraints-base.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# what must be right before anything else: every trainer's scores, and that its weights are not touched
OLDEST := tests/trainers/test_exact_dpo.py tests/trainers/test_exact_trainers.py tests/callbacks/test_harmless.py

.PHONY: demo docs test test-newest test-ppo test-oldest browser lint package clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	.venv/bin/trl-sae-audit demo

# the documentation as a site, in site/
docs: .venv/.installed-dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

# one thread a worker
test-newest test-ppo test-oldest: export OMP_NUM_THREADS ?= 1

test: lint package test-newest test-ppo test-oldest

lint: .venv/.installed-dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/lint-imports --no-logo
	.venv/bin/mypy

test-newest: .venv/.installed-dev browser
	.venv/bin/python -m pytest -n $(WORKERS)

test-ppo: .venv-ppo/.installed-dev
	.venv-ppo/bin/python -m pytest -n $(WORKERS)

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n $(WORKERS) $(OLDEST)

# The report's tests drive a Chromium. Where there is none and apt-get may be used it is installed; elsewhere they are
# skipped, and pytest's summary says how to get one.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || [ "$$(id -u)" != 0 ] \
	|| ! command -v apt-get >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } || true

# The wheel is tried in an environment that has nothing but what it requires.
package: .venv/.installed-dev
	rm -rf dist build .venv-package
	.venv/bin/python -m build --outdir dist . >/dev/null
	.venv/bin/twine check --strict dist/*
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install --quiet torch --constraint constraints.txt
	.venv-package/bin/pip install --quiet dist/*.whl --constraint constraints.txt
	.venv-package/bin/python scripts/smoke.py
	rm -rf .venv-package

# torch comes first and pinned: left to the other requirements, pip may fetch a second, larger build of it.

.venv/.installed: $(PINS) constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet torch --constraint constraints.txt
	.venv/bin/pip install --quiet --editable . --constraint constraints.txt
	touch $@

.venv/.installed-dev: .venv/.installed
	.venv/bin/pip install --quiet --editable '.[dev,docs]' --constraint constraints.txt
	touch $@

.venv-ppo/.installed-dev: $(PINS) constraints-ppo.txt
	$(PYTHON) -m venv .venv-ppo
	.venv-ppo/bin/pip install --quiet torch --constraint constraints-ppo.txt
	.venv-ppo/bin/pip install --quiet --editable '.[dev,ppo]' --constraint constraints-ppo.txt
	touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet torch --constraint constraints-oldest.txt
	.venv-oldest/bin/pip install --quiet --editable . pytest pytest-xdist --constraint constraints-oldest.txt
	touch $@

clean:
	rm -rf .venv .venv-ppo .venv-oldest .venv-package build dist runs site
