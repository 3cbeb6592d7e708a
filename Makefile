# Each target does all of its own set-up: `make serve` on a fresh machine serves.

PYTHON ?= python3
BIN := .venv/bin
DATA ?= $(or $(ANOMALYD_DATA),../shared/data)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PROOFS := tools triton kserve mlserver s3
PEERS := litserve mlserver bentoml
SOAK_SECONDS ?= 3600
BUNDLES := $(sort $(dir $(wildcard trained/*/manifest.json)))

.PHONY: serve test lint proofs soak bench protocol figures clean

serve: .venv/base
	$(BIN)/anomalyd serve --default-model fashion-mnist-vae

# A process for each core, and whole files to each, for their fixtures train and export models.
test: .venv/all lint programs fonts
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/anomalyd bundle verify $(BUNDLES)

lint: .venv/all
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# What clients, linters and servers that others made say of the daemon, of deploy/ and of clusters;
# as root.
proofs: .venv/all debian $(PROOFS:%=.venv-proofs/%/installed)
	$(BIN)/python -m pytest tests/interop/proof_*.py tests/cluster/proof_*.py

# An hour of mixed traffic, 1,000 reloads, 20 restarts, and 60,000 images on a cluster that loses a
# node, or its driver. make soak SOAK_SECONDS=600 for less.
soak: export ANOMALYD_SOAK_SECONDS = $(SOAK_SECONDS)
soak: .venv/all
	$(BIN)/python -m pytest tests/interop/proof_soak.py \
	  tests/cluster/proof_ray.py::test_a_node_that_dies_loses_and_duplicates_nothing \
	  tests/cluster/proof_ray.py::test_a_driver_that_is_killed_leaves_only_unfinished_parts

# The numbers in README and cards, and the speed ratios; minutes, not seconds.
bench: data .venv/all debian $(PEERS:%=.venv-proofs/%/installed)
	$(BIN)/python tests/bench/bench.py --data $(DATA)
	$(BIN)/python tests/bench/binarized.py --data $(DATA)
	$(BIN)/python tests/bench/few_labels.py --data $(DATA)/fashion-mnist
	for name in ratio workers; do $(BIN)/python tests/bench/bench_scale.py --data $(DATA) --only $$name || exit; done

# The tables of outliers in trained/README.md: a few minutes a PixelCNN, then half an hour of training.
protocol: data .venv/all fonts
	$(BIN)/python tests/bench/protocol.py --data $(DATA) --limit 300 --unseen
	$(BIN)/python tests/bench/protocol.py --data $(DATA) --leave-one-out fashion-mnist

# docs/example.png and trained/scores.png. `anomalyd train` draws those of a card; strangest images
# in docs/strangest/ are copies of what it leaves beside the bundle.
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

# Each client in an environment of its own, for their pins clash. MLServer needs Python < 3.13.
.venv-proofs/%/installed: tests/interop/environments/%.txt | .venv/bin/python
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -m pip --disable-pip-version-check --python $(@D)/bin/python install --quiet --no-deps --no-compile --requirement $<
	@touch $@

# The full data sets, without which there is nothing to measure.
.PHONY: data
data:
	@[ -d '$(DATA)/fashion-mnist' ] || \
	  { echo "no data sets at $(DATA), which docs/data.md lists; make $(MAKECMDGOALS) DATA=FOLDER" >&2; exit 1; }

# Programs that the proofs run, and the Debian packages that hold them.
.PHONY: debian
debian:
	@for program in promtool wrk hey chromium openssl curl shellcheck systemd-analyze ip; do \
	  command -v $$program >/dev/null || missing=yes; done; \
	[ -z "$$missing" ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    prometheus wrk hey chromium openssl curl shellcheck systemd iproute2 >/dev/null; } || true

# Programs that the tests run. Without root those of promtool, of Debian's prometheus, skip; openssl
# and curl have to be there.
.PHONY: programs
programs:
	@for program in promtool openssl curl; do command -v $$program >/dev/null || missing=yes; done; \
	[ -z "$$missing" ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    prometheus openssl curl >/dev/null; } || true

# The glyphs of the protocol come from Debian's fonts, 20 MB. Without root their tests skip, and
# protocol.py says what is missing.
.PHONY: fonts
fonts: FONTS = $(shell $(BIN)/python tests/bench/glyphs.py)
fonts: .venv/all
	@dpkg --status $(FONTS) >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(FONTS) >/dev/null; } || true

clean:
	rm -rf .venv .venv-proofs build dist *.egg-info
