# make setup | demo | test | lint | types | docs | bench | doctor | clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := work_dirs/demo
BENCH  := work_dirs/bench
CONFIG := faster-rcnn_orepa-r18-light_fpn_400i_coco.py
MIM    := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mim

.PHONY: setup demo test lint types docs bench doctor clean

setup:
	@$(PYTHON) requirements/install.py --venv $(VENV)

# Each step is left out where its result lies there already; training resumes.
demo: setup
	@$(MAKE) --no-print-directory $(DEMO)/report.html
	@echo "The report: $(CURDIR)/$(DEMO)/report.html"

$(DEMO)/shapes/annotations/instances_val2017.json:
	$(MIM) run orepa_mm make_shapes $(DEMO)/shapes

$(DEMO)/train/iter_400.pth: $(DEMO)/shapes/annotations/instances_val2017.json
	$(MIM) train orepa_mm $(CONFIG) --gpus 0 --work-dir $(DEMO)/train --data-root $(DEMO)/shapes --resume

$(DEMO)/deployed/report.json: $(DEMO)/train/iter_400.pth
	$(MIM) run orepa_mm reparam $(CONFIG) $< --work-dir $(DEMO)/test \
	    --data-root $(DEMO)/shapes --out $(DEMO)/deployed

$(DEMO)/report.html: $(DEMO)/deployed/report.json
	$(MIM) run orepa_mm report $(DEMO)/train $(DEMO)/deployed --out $@

# Two processes of one thread each: most of the time goes into starting tools.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: types
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

# The pages of docs/ as a site; a warning is an error. `.venv/bin/mkdocs serve` shows it, with search.
docs: setup
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
