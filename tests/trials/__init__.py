"""Trials that are too long for the test suite; `docs/trials.md` describes them."""
