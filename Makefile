# make setup | demo | test | lint | doctor | clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := work_dirs/demo
CONFIG := faster-rcnn_orepa-r18-light_fpn_400i_coco.py
MIM    := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mim

.PHONY: setup demo test lint doctor clean

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

lint: setup
	$(BIN)/ruff check .

doctor:
	@PY=$(BIN)/python; [ -x $$PY ] || PY=$(PYTHON); $$PY -m orepa_mm.doctor

clean:
	rm -rf $(VENV) work_dirs build dist *.egg-info orepa_mm/.mim .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
