"""Recipes rehearsed on the cluster sizes of docs/planning.md; `make test-rehearsal` rehearses all, `make test` a few."""
