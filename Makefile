# Each target does all of its own set-up: `make serve` on a fresh machine serves.

PYTHON ?= python3
BIN := .venv/bin
DATA ?= $(or $(ANOMALYD_DATA),../shared/data)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
BUNDLES := $(sort $(dir $(wildcard trained/*/manifest.json)))

.PHONY: serve test lint bench protocol figures tables clean

serve: .venv/base
	$(BIN)/anomalyd serve --default-model fashion-mnist-vae

test: .venv/all lint promtool
	$(BIN)/python -m pytest
	$(BIN)/anomalyd bundle verify $(BUNDLES)

lint: .venv/all
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The numbers in README and cards, and the speed ratios; minutes, not seconds.
bench: .venv/all
	$(BIN)/python tests/bench/bench.py --data $(DATA)

# The tables of outliers in trained/README.md; some ten minutes a PixelCNN.
protocol: .venv/all fonts
	$(BIN)/python tests/bench/protocol.py --data $(DATA)

# The pictures in README and cards.
figures: .venv/all
	$(BIN)/python tests/bench/figures.py

.venv/base: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable .
	@touch $@

# torch by its exact pin: where a CPU build of it is at hand, that is the one installed.
.venv/all: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable '.[test]'
	@touch $@ .venv/base

.venv/bin/python:
	$(PYTHON) -m venv .venv

# promtool checks the metrics; it comes with Debian's prometheus. Without root its test skips.
.PHONY: promtool
promtool:
	@command -v promtool >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends prometheus >/dev/null; } || true

# The glyphs of the protocol come from Debian's fonts. Without root protocol.py says what is missing.
.PHONY: fonts
fonts: FONTS = $(shell $(BIN)/python tests/bench/glyphs.py)
fonts: .venv/all
	@dpkg --status $(FONTS) >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(FONTS) >/dev/null; }

clean:
	rm -rf .venv build dist *.egg-info
