# Each recipe is one line that also works when typed; `just --list` shows them.

# Lint, format, imports.
check:
    uv run ruff check . && uv run ruff format --check . && uv run lint-imports

# pyright: strict on core and testkit, basic elsewhere.
types:
    uv run pyright

# Everything that runs without a GPU.
test:
    uv run pytest

# The same on a CUDA device, kernels and blocks included.
test-gpu:
    uv run pytest -m "gpu or not slow"

# Wheels, fresh environments, the documentation's build.
isolated:
    uv run --group docs pytest -m slow tests

# The documentation, warnings as errors, into docs/_build.
docs:
    uv run --group docs sphinx-build -W --keep-going -b html docs docs/_build

# README's tables: families from the registry, results from benchmarks/history.
tables:
    uv run python docs/tables.py

# Wheels of every distribution, into dist/.
release:
    uv build --all-packages --wheel
