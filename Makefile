# make setup | setup-dev | demo | test | test-long | lint | types | docs | bench | lock | doctor | clean
# MMCV=full compiles mmcv's operators; UV_TORCH_BACKEND=cpu|cu130 chooses PyTorch's build.
# STACK=onedl: with the maintained forks, in an environment of its own.
PYTHON ?= python3
STACK  ?= official
VENV   := $(if $(filter official,$(STACK)),.venv,.venv-$(STACK))
BIN    := $(VENV)/bin
DEMO   := work_dirs/demo
STEPS  := 300
BENCH  := work_dirs/bench
CONFIG := faster-rcnn_orepa-r18-light_fpn_400i_coco.py
MIM    := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mim

.PHONY: setup setup-test setup-dev lock demo test test-long lint types docs bench doctor clean

INSTALL := requirements/install.py --stack $(STACK) --venv $(VENV)
setup:
	@$(PYTHON) $(INSTALL)

setup-test:
	@$(PYTHON) $(INSTALL) --extra test

setup-dev:
	@$(PYTHON) $(INSTALL) --extra test --extra dev

# All versions anew, for every Python.
LOCK := .venv/bin/uv pip compile setup.py --universal --python-version 3.10 --no-annotate -qU \
    --override requirements/overrides.txt --extra onnx --extra safetensors --extra test
lock: setup
	$(LOCK) requirements/constraints.in --extra openmmlab --extra dev -o requirements/constraints.txt
	MMCV_WITH_OPS=0 $(LOCK) requirements/constraints-onedl.in --extra onedl \
	    -o requirements/constraints-onedl.txt

# Each step is left out where its result lies there already; training resumes.
demo: setup
	@$(MAKE) --no-print-directory $(DEMO)/report.html
	@echo "The report: $(CURDIR)/$(DEMO)/report.html"

$(DEMO)/shapes/annotations/instances_val2017.json:
	$(MIM) run orepa_mm make_shapes $(DEMO)/shapes

$(DEMO)/train/iter_$(STEPS).pth: $(DEMO)/shapes/annotations/instances_val2017.json
	$(MIM) train orepa_mm $(CONFIG) --gpus 0 --work-dir $(DEMO)/train --data-root $(DEMO)/shapes --resume \
	    --cfg-options train_cfg.max_iters=$(STEPS)

$(DEMO)/deployed/report.json: $(DEMO)/train/iter_$(STEPS).pth
	$(MIM) run orepa_mm reparam $(CONFIG) $< --work-dir $(DEMO)/test \
	    --data-root $(DEMO)/shapes --out $(DEMO)/deployed

$(DEMO)/report.html: $(DEMO)/deployed/report.json
	$(MIM) run orepa_mm report $(DEMO)/train $(DEMO)/deployed --out $@

# Three processes of one thread each: on two cores one waits for tools that start. All tests; with
# the forks those of the method, of files and checkpoints, and from training to deployment.
TESTS_onedl := tests/golden tests/layers tests/checkpoints tests/reparam tests/backbones \
    tests/hostile/test_checkpoint_files.py tests/engine/test_training.py \
    tests/engine/test_resume.py tests/engine/test_exact_resume.py \
    tests/integration/test_train_to_deploy.py tests/integration/test_other_tasks.py \
    tests/integration/test_stock_configs.py tests/test_imports.py tests/test_doctor.py \
    tests/test_mmcv_ext.py tests/test_packaging.py
test: setup-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile $(TESTS_$(STACK))

# What takes minutes per test: many seeds, kills at any moment, compilers.
test-long: setup-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m long

lint: types
	$(BIN)/ruff check .

types: setup-dev
	$(BIN)/mypy

# The pages of docs/ as a site; a warning is an error. `.venv/bin/mkdocs serve` shows it, with search.
docs: setup-dev
	$(BIN)/mkdocs build
	@echo "The site: $(CURDIR)/site/index.html"

# What it costs on this machine; see docs/performance.md. Ten minutes on two idle cores.
BENCHMARK := $(BIN)/python tools/benchmark.py
R50       := configs/faster_rcnn/faster-rcnn_orepa-r50_fpn_1x_coco.py
bench: setup
	$(BENCHMARK) theory --out $(BENCH)
	$(BENCHMARK) squeeze --rounds 10 --warmup 2 --plot --out $(BENCH)
	$(BENCHMARK) step --rounds 6 --warmup 1 --plot --out $(BENCH)
	$(BENCHMARK) step --launch-bound --rounds 50 --plot --out $(BENCH)
	$(BENCHMARK) memory --plot --out $(BENCH)
	$(BENCHMARK) latency --rounds 10 --warmup 2 --plot --out $(BENCH)
	$(BENCHMARK) latency --launch-bound --rounds 100 --plot --out $(BENCH)
	$(BENCHMARK) convert $(R50) --rounds 5 --warmup 1 --out $(BENCH)
	$(BENCHMARK) optimizer $(R50) --rounds 10 --out $(BENCH)
	$(BENCHMARK) tables $(BENCH)

doctor:
	@PY=$(BIN)/python; [ -x $$PY ] || PY=$(PYTHON); $$PY -m orepa_mm.doctor

clean:
	rm -rf $(VENV) work_dirs build dist site *.egg-info orepa_mm/.mim .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
