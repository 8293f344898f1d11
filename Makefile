# kvlearn: `make lab` opens the course, `make help` lists the rest. GNU Make 3.81 and a POSIX shell are enough.
PYTHON ?=
TORCH_INDEX ?=
NAME ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# An address that was given once is used again when the list of packages changes.
INDEX := $(or $(TORCH_INDEX),$(shell cat $(VENV)/.torch-index 2>/dev/null))
# On a busy machine torch's threads lose most of their time spinning for each other; asleep they are six times faster.
SHARE := OMP_WAIT_POLICY=passive
# Notebooks that git keeps show nothing of the progress of the person who runs them.
NO_WORK := KVLEARN_WORK=/dev/null
# Two workers with one thread each are faster than one with two; a notebook's timings want the machine alone.
PYTEST := $(SHARE) OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadgroup
# The library, the grader and the course's files; no other people's models, pictures, benchmarks, studies.
QUICK := -m "not slow and not answers" $(addprefix --ignore=tests/,bench oracles plots study)
NBVAL := -p no:python --nbval --nbval-sanitize-with tests/course/nbval_sanitize.cfg --nbval-cell-timeout=300
CLEAN_METADATA := --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.clear_cell_metadata=False \
  --ClearMetadataPreprocessor.preserve_nb_metadata_mask="{('language_info', 'name'), 'kernelspec', 'kvlearn'}"

# The course brings its own Python and its own Jupyter settings; what the user's shell or home holds stays out.
# Python keeps what it compiled: without that the tests and their kernels compile the library a hundred times.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV JUPYTER_PATH JUPYTER_CONFIG_PATH MPLBACKEND
export PATH := $(CURDIR)/$(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
export JUPYTER_CONFIG_DIR := $(CURDIR)/.jupyter/config
export JUPYTER_DATA_DIR := $(CURDIR)/.jupyter/data
export IPYTHONDIR := $(CURDIR)/.jupyter

JUPYTER := $(SHARE) $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help env lab teach test quick grade bench study notebooks exercises lock clean lint unit nbval format coverage site badges

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

env: $(READY) ## make .venv with everything pinned (PYTHON=python3.12: with it; TORCH_INDEX=address: torch from there)
	@[ -z "$(TORCH_INDEX)" ] || [ "$$(cat $(READY))" = "$(TORCH_INDEX)" ] || { \
	  echo "kvlearn: .venv was made without this TORCH_INDEX: make clean, then run it again" >&2; exit 1; }
	@echo "kvlearn: .venv is ready; make lab opens the course"

lab: $(READY) ## open the course in JupyterLab, with your copies in work/ (ARGS="--no-browser --port 8890")
	@$(BIN)/kvlearn start || :
	@$(JUPYTER) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(ARGS)

teach: $(READY) ## the same with nbgrader's menu, buttons and panels, for teachers
	@JUPYTER_CONFIG_PATH="$(CURDIR)/$(VENV)/etc/jupyter/teach" $(JUPYTER) $(ARGS)

test: lint unit nbval ## everything: lint, types, tests, every notebook run afresh and compared

quick: lint ## lint, types and what is fast of the tests, no notebooks: about two minutes
	@$(PYTEST) $(QUICK)

format: $(READY) ## let ruff format the code and mend what it can
	@$(BIN)/ruff check -q --fix
	@$(BIN)/ruff format -q

coverage: $(READY) ## which lines the unit tests run (ARGS="tests/model": those tests alone)
	@$(SHARE) OMP_NUM_THREADS=1 $(BIN)/coverage run --source kvlearn -m pytest -q $(ARGS)
	@$(BIN)/coverage report --skip-covered --show-missing

grade: $(READY) ## grade your exercises in work/ (ARGS="--json")
	@$(BIN)/kvlearn grade $(ARGS)

bench: $(READY) ## measure this machine: make bench NAME=full (all of it without a NAME)
	@$(BIN)/kvlearn bench $(or $(NAME),all) $(ARGS)

study: $(READY) ## train the base model again, or what NAME says (kvlearn study --help)
	@$(BIN)/kvlearn study $(or $(NAME),base) $(ARGS)

# The second pass joins what a cell prints, which comes in pieces. A widget's id is drawn anew in every run; an empty
# one is what a saved notebook can keep.
notebooks: $(READY) ## run every notebook in place and keep its outputs
	@$(SHARE) $(NO_WORK) $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=600 \
	  --ExecutePreprocessor.record_timing=False $(CLEAN_METADATA) notebooks/*.ipynb solutions/*/*.ipynb
	@$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --inplace --CoalesceStreamsPreprocessor.enabled=True \
	  notebooks/*.ipynb solutions/*/*.ipynb
	@for notebook in notebooks/*.ipynb; do \
	  sed 's/"model_id": "[0-9a-f]*"/"model_id": ""/' "$$notebook" >"$$notebook.new" && mv "$$notebook.new" "$$notebook"; done

exercises: $(READY) ## generate exercises/ from solutions/ (a file you changed stays as it is)
	@$(BIN)/python -m kvlearn.grading.release

# nvidia-* and cuda-* stay out: torch pins its own, and a CPU build of torch wants none of them.
site: $(READY) ## the course as a web site, in site/html (outputs as they are committed)
	@$(BIN)/python -m kvlearn.glossary
	@$(BIN)/python docs/source.py site/source
	@$(BIN)/sphinx-build -q -W --keep-going -j auto -c docs -b html site/source site/html
	@echo "kvlearn: open site/html/index.html"

badges: $(READY) ## "Open in Colab" in README and chapters, once git's remote is on GitHub (KVLEARN_REPOSITORY=address)
	@$(BIN)/python docs/colab.py badges

lock: ## renew requirements.txt from pyproject.toml (needs uv; ARGS=--upgrade for newer versions)
	@command -v uv >/dev/null || { echo "make lock needs uv: pip install uv"; exit 1; }
	@uv pip compile pyproject.toml --universal --all-extras --no-annotate --no-header --quiet -o requirements.txt $(ARGS)
	@{ echo "# The one pinned list, made by \`make lock\`: Linux and macOS, Python 3.11 to 3.14."; \
	   echo "-e .[lab,test,teach,site]"; grep -v -E '^(nvidia|cuda)-' requirements.txt; } > requirements.txt.new
	@mv requirements.txt.new requirements.txt

clean: ## remove .venv and caches; your exercises stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

lint: $(READY)
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format --check -q
	@$(BIN)/mypy

unit: $(READY)
	@$(PYTEST)

# Two notebooks side by side: a chapter compares in one process, by ratios, what it times.
nbval: $(READY)
	@$(SHARE) $(NO_WORK) $(BIN)/pytest -q $(NBVAL) -n 2 --dist loadfile notebooks
	@$(SHARE) $(NO_WORK) OMP_NUM_THREADS=1 $(BIN)/pytest -q $(NBVAL) -n 2 --dist loadfile solutions

# Makes .venv anew, with the first Python that fits. --clear removes what an interrupted set-up has left.
define MAKE_VENV
for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14); do \
  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && break; python=; done; \
if [ -z "$$python" ]; then \
  echo "kvlearn needs Python 3.11 to 3.14, and $(or $(PYTHON),python3) is not one: install one, or name yours: make env PYTHON=/path/to/python3.12" >&2; \
  exit 1; fi; \
said=$$("$$python" -m venv --clear $(VENV) 2>&1) || { rm -rf $(VENV); \
  echo "kvlearn: $$python cannot make a virtual environment ($$(echo "$$said" | grep . | tail -1)): check the disk and its venv module (Debian, Ubuntu: apt install python3-venv), then run make again" >&2; \
  exit 1; }
endef

# pip starts, runs in .venv and has all its files: a set-up that was killed can leave python without it.
PIP_WORKS := $(BIN)/python -c 'import sys, importlib.metadata as m, pip; sys.exit(sys.prefix == sys.base_prefix or \
  any(f.suffix != ".pyc" and not f.locate().exists() for f in m.files("pip")) and "files of pip are missing")'

# One small package, asked for once: pip itself would repeat each of its requests for minutes.
ONLINE := $(BIN)/python -m pip install --disable-pip-version-check --dry-run --ignore-installed --no-deps \
  --no-cache-dir --retries 0 --timeout 10 -vv "$$(grep -m1 '^typing-extensions==' requirements.txt)" \
  $(if $(INDEX),--extra-index-url "$(INDEX)") >$(VENV)/install.log 2>&1
WHY := grep -E '^ *(Could not fetch URL|ERROR:|[A-Za-z]+Error:)' $(VENV)/install.log | head -1 | sed 's/.*\(\[Errno\)/\1/'

# The stamp is written last, so an interrupted or failed set-up is taken up again by the next `make`.
$(READY): requirements.txt pyproject.toml $(BIN)/python
	@rm -f $(READY)
	@said=$$($(PIP_WORKS) 2>&1) || { \
	  echo "kvlearn: pip in $(VENV) does not work ($$(echo "$$said" | tail -1)): making $(VENV) anew"; \
	  rm -rf $(VENV); $(MAKE_VENV); }
	@echo "$(INDEX)" >$(VENV)/.torch-index
	@$(ONLINE) || { \
	  echo "kvlearn: pip cannot fetch packages ($$($(WHY))): check network and disk, then run make again; all of it in $(VENV)/install.log" >&2; \
	  exit 1; }
	@echo "kvlearn: installing requirements.txt into $(VENV), 2 to 5 minutes (log: $(VENV)/install.log)"
	@$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt \
	  $(if $(INDEX),--extra-index-url "$(INDEX)") >$(VENV)/install.log 2>&1 || { \
	  echo "kvlearn: pip could not install requirements.txt ($$(grep -E '^ *(ERROR|[A-Za-z]+Error): ' $(VENV)/install.log | tail -1 | sed 's/^ *//')): check network and disk, then run make again; all of it in $(VENV)/install.log" >&2; \
	  exit 1; }
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 >>$(VENV)/install.log 2>&1
	@$(BIN)/python -m kvlearn.jupyter.settings
	@echo "$(INDEX)" >$(READY)

# A dangling link (its interpreter was upgraded away) counts as missing, so .venv is then made anew.
$(BIN)/python:
	@$(MAKE_VENV)
