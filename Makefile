# make demo    ask the embedded model about a picture
# make test    linters, types, import contracts and tests, with the same examples in every run
# make fuzz    the tests that draw their examples, with new ones for MINUTES
# make test-clients  large client libraries, and thousands of generated requests, against the service
# make stress  the tests that wait for something, RUNS times (AT_ONCE together) beside LOAD busy processes
# make lock    the newest versions that fit, with hashes, in requirements/
# make sbom    what a container holds, as CycloneDX, in build/sbom.json
# All set up .venv themselves.

PYTHON ?= python3
BIN := .venv/bin
# Where PyTorch offers builds without CUDA (gigabytes smaller); out of reach, pip takes its usual one.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

MINUTES ?= 5
RUNS ?= 10
AT_ONCE ?= 1
LOAD ?= 8

.PHONY: demo test test-clients fuzz stress lock sbom clean

demo: .venv/.runtime
	$(BIN)/mcv-run --image models/tiny/demo.png --prompt "What does the text say?"

test: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHONHASHSEED=0 $(BIN)/pytest -n auto --dist loadfile --max-worker-restart 0

fuzz: .venv/.dev
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

stress: .venv/.dev
	$(BIN)/python tests/stress.py --runs $(RUNS) --at-once $(AT_ONCE) --load $(LOAD)

test-clients: .venv/.clients
	.venv-clients/bin/python tests/serve/heavy/clients.py --server $(BIN)/python --node-modules .venv-clients/npm \
		--only litellm langchain llama-index docling marker npm
	.venv-clients/daft/bin/python tests/serve/heavy/clients.py --server $(BIN)/python --only daft
	.venv-clients/bin/python tests/serve/heavy/generated_requests.py --server $(BIN)/python

clean:
	rm -rf .venv .venv-clients build *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mcv needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.runtime: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e .
	touch $@

# Large, and with needs of their own: they never share the environment of the tests.
.venv/.clients: .venv/.dev
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet litellm langchain-openai llama-index-llms-openai-like schemathesis \
		"docling-slim[convert-core,format-markdown,format-pdf-pypdfium2]"
	# Without its needs, which are a Pillow without the last mends, and a model to run: the class that asks others has others.
	.venv-clients/bin/pip install --quiet --no-deps marker-pdf
	$(PYTHON) -m venv .venv-clients/daft
	.venv-clients/daft/bin/pip install --quiet "daft[openai]"
	npm install --silent --prefix .venv-clients/npm openai ollama
	touch $@

.venv/.dev: .venv/bin/python pyproject.toml
	# One index at a time: what both have would else come from whichever claims the higher version.
	$(BIN)/pip install --quiet --retries 1 --timeout 30 --no-deps --index-url $(TORCH_INDEX) "torch>=2.13,<2.14" || true
	$(BIN)/pip install --quiet -e ".[dev]"
	# Without its needs: it asks for a torchvision that may not fit the torch above, for picture transforms that no test uses.
	$(BIN)/pip install --quiet --no-deps "timm==1.0.22"
	touch $@ .venv/.runtime

# Tools of their own, which nothing here imports.
.venv/.tools: .venv/bin/python
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/pip install --quiet "uv>=0.9" "cyclonedx-bom>=7"
	touch $@

LOCK := .venv/tools/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock" --upgrade pyproject.toml

lock: .venv/.tools
	$(LOCK) --extra guided --extra pdf --extra video --output-file requirements/runtime.txt
	$(LOCK) --extra dev --constraint requirements/runtime.txt --output-file requirements/dev.txt

sbom: .venv/.tools
	mkdir -p build
	.venv/tools/bin/cyclonedx-py requirements requirements/runtime.txt --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json
