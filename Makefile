# `make` lists the tasks; tasks.py does them (on Windows: `py tasks.py demo`). Needs Python >= 3.10, nothing else.
#   make demo [MINUTES=5] [DATA=data/coco_tiny] [MODEL=preset] [RUN=runs/name]
#   make coco-table1 [DATA=folder of COCO] [ARGS="--processes 4 --tflops 20"]
#   make coco-study [PRINT=1] [DATA=folder of COCO] [ARGS="--processes 4"]
#   make PYTHON=python3.12 test ARGS="-k boxes"
#   make demo ARGS=--cpu        (or --gpu: the build of PyTorch that a new environment on Linux gets)
PYTHON ?= python3
ARGS ?=

TASKS = demo test test-fast coco-study coco-table1 lab notebooks book explainer lint format

.PHONY: help python $(TASKS)

help: python
	@"$(PYTHON)" tasks.py --help

$(TASKS): python
	@"$(PYTHON)" tasks.py $@ $(OPTIONS) $(ARGS)

demo: OPTIONS = $(if $(MINUTES),--minutes "$(MINUTES)") $(if $(DATA),--data "$(DATA)") \
	$(if $(MODEL),--model "$(MODEL)") $(if $(RUN),--run "$(RUN)")

coco-study: OPTIONS = $(if $(DATA),--data "$(DATA)") $(if $(PRINT),--print)

coco-table1: OPTIONS = $(if $(DATA),--data "$(DATA)")

python:
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || { \
	echo "This needs Python 3.10 or newer, and '$(PYTHON)' is missing or older." >&2; \
	echo "Install one (python.org, or your system's packages), or name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1; }
