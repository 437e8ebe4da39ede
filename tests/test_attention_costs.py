"""The benchmark of attention: rows for every implementation of a platform."""

import jax.numpy as jnp
import pytest

from launch import attention_costs


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_implementations_of_this_machine_are_measured_with_their_memory(monkeypatch):
    monkeypatch.setitem(attention_costs._SIDE, "cpu", 64)
    monkeypatch.setattr(attention_costs, "HEADS", {"cpu": 1})
    title, _, head, _, *rows = attention_costs.study([256], jnp.float32, repeats=1)
    assert "1 heads of 64, float32" in title and cells(head) == list(attention_costs.HEAD)
    wanted = [(name, run) for name in ("reference", "xla") for run in ("forward", "and backward")]
    assert [tuple(cells(row)[1:3]) for row in rows] == wanted
    for row in map(cells, rows):
        assert row[0] == "256" and float(row[3]) > 0 and float(row[-1]) > 0
        # Products over time, in the units of the table.
        flop = {"forward": 4, "and backward": 14}[row[2]] * 256 * 256 * 64
        assert float(row[4]) == pytest.approx(flop / float(row[3]) * 1e-9, rel=0.1, abs=1e-3)


def test_what_plans_for_too_much_is_not_run(monkeypatch):
    monkeypatch.setitem(attention_costs._SIDE, "cpu", 64)
    monkeypatch.setattr(attention_costs, "HEADS", {"cpu": 1})
    monkeypatch.setattr(attention_costs, "MAX_MIB", {"cpu": 0.0})
    rows = list(attention_costs.study([24], jnp.float32, repeats=1))[4:]
    assert all(cells(row)[3] == "not run" for row in rows)
