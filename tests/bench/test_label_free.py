"""The rank correlation of label-free figures against scipy's definition by hand, and its table."""

import json

import numpy as np
import pytest

from bench.label_free import main, ranks, spearman


def test_ranks_share_where_values_are_equal():
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_spearman_is_pearsons_of_the_ranks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(size=30)
    # without ties: 1 - 6 sum d^2 / (n (n^2 - 1))
    d = ranks(a) - ranks(b)
    assert spearman(a, b) == pytest.approx(1 - 6 * (d @ d) / (30 * 899))
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_the_table_of_runs(tmp_path, capsys):
    runs = []
    for number in range(3):
        run = tmp_path / str(number)
        run.mkdir()
        lines = []
        for step in range(0, 50, 10):
            accuracy = 0.1 + 0.01 * step + 0.1 * number
            lines.append({"step": step, "effective_rank": 3.0 + step, "cosine": -step})
            lines.append({"step": step, "online_linear": accuracy})
        (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
        runs.append(str(run))
    main(runs)
    shown = capsys.readouterr().out
    assert "3 runs, [4, 4, 4] looks" in shown
    assert "| effective_rank | +1.00 (+1.00, +1.00, +1.00) | +nan |" in shown
    assert "| cosine | -1.00" in shown and "| loss |" not in shown
