# What continuous integration runs (.ci/run), one target each, in the environment that is active.
.PHONY: test slow lint types bench map

test:
	pytest -n 2

slow:
	pytest -n 2 -m slow

lint:
	ruff check .
	ruff format --check .

types:
	mypy

bench:
	pytest benchmarks --benchmark-only

map:
	python -m tests.architecture
