"""The table of the evaluations: which commands it runs, and how its cells are made."""

import json

from bench import evaluation_table


def test_its_cells_come_from_what_ijepa_eval_wrote(tmp_path, monkeypatch, capsys):
    ran = []

    def pretend(arguments):
        ran.append(arguments)
        if "--resume" in arguments:
            arguments = ran[6]
        out = arguments[arguments.index("--out") + 1]
        seed = int(arguments[arguments.index("--seed") + 1]) if "--seed" in arguments else 0
        draws = [0.2, 0.3, 0.4] if "lowshot" in arguments else []
        accuracy = (0.1 if "--random-network" in arguments else 0.5) + 0.1 * seed
        best = {"accuracy": accuracy, "draws": draws}
        with open(out, "w") as file:
            json.dump({"best": best, "interval_95": [accuracy - 0.05, accuracy + 0.05]}, file)
        return 0

    monkeypatch.setattr(evaluation_table.cli, "main", pretend)
    monkeypatch.setattr("sys.argv", ["evaluation_table", "RUN", "shapes", str(tmp_path)])
    evaluation_table.main()
    shown = capsys.readouterr().out
    assert "| kNN, best k | 50.0 (45.0 to 55.0) | 10.0 (5.0 to 15.0) |" in shown
    assert "| low-shot probe, 10 labels a class | 30.0 ± 10.0 (3) | 30.0 ± 10.0 (3) |" in shown
    assert "| fine-tuned, 10 labels a class | 60.0 ± 10.0 (3) | 20.0 ± 10.0 (3) |" in shown
    assert len(ran) == 2 * (1 + 1 + 1 + 3 + 1)
    few = next(a for a in ran if "--per-class" in a and "finetune" in a)
    assert few[:4] == ["eval", "finetune", "RUN", "--data"] and "--output" in few
    evaluation_table.main()
    assert len(ran) == 14  # nothing is run again
    stopped = ran[6]
    (tmp_path / "shapes-few-trained-0.json").unlink()
    folder = tmp_path / "runs" / "shapes-few-trained-0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step-00000003\n")
    assert "--per-class" in stopped
    evaluation_table.main()
    assert len(ran) == 15 and ran[-1] == ["eval", "finetune", "--resume", str(folder)]
