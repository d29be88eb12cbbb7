# Works from nothing but Python (3.10 to 3.13) with venv and pip. `make demo PYTHON=python3.12` picks another Python.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test check docs wheel kernels matrix clean

demo: $(VENV)/installed-all-cpu
	@echo "== mgn-deploy demo: draw people, train, export, prove, embed, validate (about 3 minutes)"
	$(VENV)/bin/mgn-deploy demo

test: $(VENV)/installed-dev
	@echo "== the test suite"
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --max-worker-restart 0
	$(VENV)/bin/python -m pytest --quiet tests/index/test_milvus_index.py

check: $(VENV)/installed-dev
	@echo "== style and types"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	MYPYPATH=build/types $(VENV)/bin/mypy -p mgn_deploy

docs: $(VENV)/installed-dev
	@echo "== the documentation in build/site (a broken link fails)"
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(VENV)/bin/python -m mkdocs build --strict --quiet

wheel: $(VENV)/installed-dev
	@echo "== a wheel in dist/"
	$(VENV)/bin/python -m build --wheel

kernels: $(VENV)/installed-dev
	@echo "== the CUDA kernels for every architecture (by NVRTC, 3 minutes): registers, and no spills"
	$(VENV)/bin/python -m mgn_deploy.kernels.build

TORCHES ?= 2.6.0 2.11.0

matrix:
	@for torch in $(TORCHES); do \
	  echo "== the operator and the GPU engine with PyTorch $$torch in an environment of its own (5 GB each)"; \
	  $(PYTHON) -m venv $(VENV)-torch-$$torch && \
	  $(VENV)-torch-$$torch/bin/python -m pip install --quiet --disable-pip-version-check torch==$$torch -e '.[cpu,train]' \
	    'pytest>=8' 'pytest-timeout>=2.3' && \
	  $(VENV)-torch-$$torch/bin/python -m pytest --quiet tests/kernels/test_torch_op*.py tests/backends/test_torch_cuda.py || exit 1; \
	done

clean:
	rm -rf $(VENV) $(VENV)-torch-* build dist mgn-demo *.egg-info

$(VENV)/bin/python:
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-all-cpu: pyproject.toml | $(VENV)/bin/python
	@echo "== installing mgn-deploy and its engines (PyTorch is 5 GB: a few minutes)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[all-cpu]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "== installing mgn-deploy, its engines and the test tools (PyTorch is 5 GB: a few minutes)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[all-cpu,dev]'
	@touch $@ $(VENV)/installed-all-cpu
