"""`ijepa eval`: every protocol end to end on generated files, and its figures against others'."""

import json

import numpy as np
import pytest
import task_files
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from small_runs import photographs, small_recipe

from ijepa import cli
from ijepa.downstream import task_features
from ijepa.downstream.embed import Embedding
from ijepa.downstream.evaluation import evaluate, open_bench
from ijepa.downstream.options import EncoderOptions, KnnOptions, LinearOptions, LowshotOptions
from ijepa.downstream.protocols import PROTOCOLS, LinearProtocol, is_random, view_transform
from ijepa.evaluate.low_shot import draw_per_class, listed_images
from ijepa.evaluate.pretrained import evaluation_crop
from ijepa.evaluate.tasks import open_task
from ijepa.evaluate.tasks import opening as task_opening
from ijepa.train.pretrain import pretrain

ON_THE_SPOT = EncoderOptions(workers=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_CACHE", str(folder / "cache"))
        settings = photographs(folder / "photos", 12, classes=1)
        pretrain(small_recipe(folder / "run", train__steps=2, model__depth=5, **settings))
    return str(folder / "run")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return task_files.class_folders(tmp_path / "data", classes=4, each=25)


def options(kind, run, folder, **others):
    return kind(source=run, data="folder", path=folder, encoder=ON_THE_SPOT, **others)


def test_knn_votes_as_scikit_learn_does(run, folder):
    result = evaluate(options(KnnOptions, run, folder, neighbours=(1, 5), temperature=0.1))
    bench = open_bench(options(KnnOptions, run, folder))
    train, test = bench.features("train"), bench.features("test")
    expected = []
    for layers in ("last", "last4"):
        mean = train.of(layers).mean(axis=0)
        rows = [f.of(layers) - mean for f in (train, test)]
        rows = [r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows]
        for count in (1, 5):
            model = KNeighborsClassifier(
                count,  # |a - b|^2 = 2 - 2 cosine of unit rows
                weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.1),
            )
            model.fit(rows[0], train.labels)
            expected.append(model.score(rows[1], test.labels))
    assert [figure.accuracy for figure in result.figures] == pytest.approx(expected)
    assert [figure.what for figure in result.figures][:2] == ["last, k 1", "last, k 5"]


def test_probes_agree_with_scikit_learn_on_the_same_features(run, folder):
    """As far as the draw of 20 test images lets one tell, and the strongest fits agree."""
    by_lbfgs = evaluate(options(LinearOptions, run, folder, solver="lbfgs"))
    grid = evaluate(options(LinearOptions, run, folder, epochs=40, step_images=20))
    bench = open_bench(options(LinearOptions, run, folder))
    train, test = bench.features("train"), bench.features("test")
    scaler = StandardScaler().fit(train.last4)
    theirs = max(
        LogisticRegression(C=c, max_iter=500)
        .fit(scaler.transform(train.last4), train.labels)
        .score(scaler.transform(test.last4), test.labels)
        for c in (1, 100)
    )
    assert theirs > 0.6  # brightness tells the classes: there is something to agree about
    noise = 2 * (theirs * (1 - theirs) / len(test.labels)) ** 0.5 + 1e-9
    for result in (by_lbfgs, grid):
        assert abs(result.best.accuracy - theirs) <= noise
    assert len(grid.figures) == 4 * 4 * 2 and grid.settings["epochs"] == 40


def test_low_shot_is_scikit_learn_on_the_drawn_rows(run, folder, capsys):
    result = evaluate(options(LowshotOptions, run, folder, per_class=3, draws=2, seed=5))
    bench = open_bench(options(LowshotOptions, run, folder))
    train, test = bench.features("train"), bench.features("test")
    expected = []
    for seed in (5, 6):
        rows = draw_per_class(train.labels, 3, 4, seed)
        assert np.bincount(train.labels[rows]).tolist() == [3, 3, 3, 3]
        scaler = StandardScaler().fit(train.of("last")[rows])
        model = LogisticRegression(C=12 / 0.1, max_iter=1000)
        model.fit(scaler.transform(train.of("last")[rows]), train.labels[rows])
        expected.append(model.score(scaler.transform(test.of("last")), test.labels))
    (figure,) = [f for f in result.figures if f.what == "last, lambda 0.1"]
    assert figure.draws == pytest.approx(expected, abs=0.051)  # one of 20 images
    assert figure.accuracy == pytest.approx(np.mean(figure.draws))
    assert "±" in capsys.readouterr().out


def test_low_shot_by_a_list_of_files(run, folder, tmp_path, capsys):
    names = [f"class-{c}/{n}.png" for c in range(4) for n in range(25)]
    for name in names:  # names that tell files apart, as ImageNet's do
        (folder / name).rename((folder / name).with_name(name.replace("/", "_")))
    bench = open_bench(options(LowshotOptions, run, folder))
    fitted = [bench.task.train.source.name(i).split("/")[-1] for i in range(80)]
    (tmp_path / "list.txt").write_text("\n".join(fitted[::5]) + "\n")
    result = evaluate(options(LowshotOptions, run, folder, list=tmp_path / "list.txt"))
    assert result.settings["labelled_images"] == 16
    (tmp_path / "wrong.txt").write_text("none.png\n")
    arguments = ["eval", "lowshot", run, "--data", "folder", "--path", str(folder)]
    assert cli.main([*arguments, "--list", str(tmp_path / "wrong.txt")]) == 1
    assert "1 of 1 names in" in capsys.readouterr().err
    assert cli.main(arguments) == 1
    assert "either --per-class N or --list FILE" in capsys.readouterr().err
    assert cli.main([*arguments, "--per-class", "21"]) == 1
    assert "has 20 images, fewer than 21 labels a class" in capsys.readouterr().err


def test_a_list_must_mean_one_image_a_line(tmp_path):
    (tmp_path / "list.txt").write_text("b.jpg\n\na.jpg\nb.jpg\n")
    assert listed_images(tmp_path / "list.txt", ["x/c.jpg", "y/b.jpg", "a.jpg"]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="1 images share their file name with others"):
        listed_images(tmp_path / "list.txt", ["x/a.jpg", "y/a.jpg", "b.jpg"])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        listed_images(tmp_path / "empty.txt", ["a.jpg"])


def test_a_second_evaluation_computes_nothing_again(run, folder, monkeypatch, capsys):
    first = evaluate(options(KnnOptions, run, folder))
    assert "embedding train images" in capsys.readouterr().out

    def not_again(*_args, **_options):
        raise AssertionError("features are there")

    monkeypatch.setattr("ijepa.evaluate.pretrained.PretrainedEncoder.embed", not_again)
    assert evaluate(options(KnnOptions, run, folder)).figures == first.figures
    with pytest.raises(AssertionError, match="features are there"):  # another network's are not
        evaluate(options(KnnOptions, run, folder, random_network=True))
    task_files.picture(folder / "class-0" / "0.png", 3, 77)  # nor those of another image
    with pytest.raises(AssertionError, match="features are there"):
        evaluate(options(KnnOptions, run, folder))


def test_an_unreadable_image_takes_its_label_along(run, folder):
    bench = open_bench(options(KnnOptions, run, folder))
    broken = bench.task.train.source.name(7)
    with open(broken, "wb"):
        pass
    bench = open_bench(options(KnnOptions, run, folder))
    train = bench.features("train")
    assert train.unreadable == 1 and len(train.labels) == 79
    assert train.images.tolist() == [n for n in range(80) if n != 7]
    assert np.array_equal(train.labels, bench.task.train.labels[train.images])


CASES = {
    "cached": (lambda root: task_files.class_folders(root), "folder"),
    "imagenet": (lambda root: task_files.class_folders(root, split=True), "folder"),
    "imagenet-released": (lambda root: task_files.class_folders(root, split=True), "folder"),
    "cifar100": (lambda root: task_files.cifar(root, "cifar100", each=1), "cifar100"),
    "cifar100-released": (lambda root: task_files.cifar(root, "cifar100", each=1), "cifar100"),
    "places205": (lambda root: task_files.places205(root), "places205"),
    "inat18": (lambda root: task_files.inat18(root), "inat18"),
    "clevr-count": (lambda root: task_files.clevr(root), "clevr-count"),
    "clevr-count-released": (lambda root: task_files.clevr(root), "clevr-count"),
    "clevr-dist": (lambda root: task_files.clevr(root), "clevr-dist"),
    "clevr-dist-released": (lambda root: task_files.clevr(root), "clevr-dist"),
}


def test_every_preset_has_a_case():
    assert set(CASES) == set(PROTOCOLS)


@pytest.mark.parametrize("preset", CASES)
def test_every_preset_runs_on_files_of_the_right_layout(preset, run, tmp_path, monkeypatch, capsys):
    make, data = CASES[preset]
    root = make(tmp_path / "data")
    disk = dict(task_opening._ON_DISK)
    for name in ("places205", "inat18"):  # of five classes here
        reader = disk[name]
        monkeypatch.setitem(
            task_opening._ON_DISK, name, lambda path, channels, reader=reader: reader(
                path, channels, classes=5
            ),
        )  # fmt: skip
    out = tmp_path / "result.json"
    command = ["eval", "linear", run, "--data", data, "--path", str(root), "--protocol", preset,
               "--epochs", "2", "--workers", "0", "--out", str(out)]  # fmt: skip
    assert cli.main(command) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    protocol = PROTOCOLS[preset]
    heads = 4 * len(protocol.lrs) * len(protocol.weight_decays)
    assert f"best of {heads}" in shown and "95 % interval" in shown
    result = json.loads(out.read_text())
    assert len(result["figures"]) == heads
    assert result["settings"]["preset"] == preset and result["settings"]["epochs"] == 2
    assert result["interval_95"][0] <= result["best"]["accuracy"] <= result["interval_95"][1]


def test_the_presets_are_the_papers():
    imagenet, cifar = PROTOCOLS["imagenet"], PROTOCOLS["cifar100"]
    assert imagenet == LinearProtocol("lars", 50, 16384, (0.01, 0.05, 0.001), (5e-4, 0.0),
                                      (15, 30, 45), 0.0, "random crop", "crop")  # fmt: skip
    assert [imagenet.factor(10 * e, 10) for e in (0, 14, 15, 29, 30, 45, 49)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.001, 0.001]
    )
    assert PROTOCOLS["imagenet-released"].lrs == (0.1, 0.01)
    assert (cifar.optimizer, cifar.epochs, cifar.batch_size, cifar.milestones) == (
        "sgd", 28, 256, (8, 16, 24),
    )  # fmt: skip
    epochs = {name: PROTOCOLS[name].epochs for name in ("places205", "inat18", "clevr-count",
                                                        "clevr-dist")}  # fmt: skip
    assert list(epochs.values()) == [14, 84, 50, 100]
    cosine = PROTOCOLS["clevr-dist"]
    assert cosine.factor(0, 7) == 1 and cosine.factor(700, 7) == pytest.approx(0.01)
    assert cosine.factor(350, 7) == pytest.approx(0.505)
    assert not any("random" in PROTOCOLS[n].train_view for n in PROTOCOLS if "clevr" in n)


def test_views_differ_where_they_are_random():
    own = evaluation_crop((16, 16))
    sizes, keys = np.array([[40, 60]] * 64), np.arange(64, dtype=np.uint64)
    for view in ("own", "crop", "squash", "flipped crop", "flipped squash", "random crop"):
        transform = view_transform(view, own, (16, 16))
        views = transform.views(sizes, keys)
        assert (len(set(views)) > 1) == is_random(view)
        assert transform.size == (16, 16)
        if is_random(view):
            assert 16 < sum(v.flip for v in views) < 48
    crop, flipped = (view_transform(v, own, (16, 16)) for v in ("crop", "flipped crop"))
    plain, turned = crop.views(sizes[:1], keys[:1])[0], flipped.views(sizes[:1], keys[:1])[0]
    assert (plain.box, plain.resized, plain.offset) == (turned.box, turned.resized, turned.offset)


def test_random_views_are_drawn_by_epoch_and_image(run, folder):
    bench = open_bench(options(LinearOptions, run, folder))
    transform = view_transform("random crop", bench.embedding.transform, (16, 16))

    def rows(seed, epoch, at_once):
        embedding = Embedding("last4", transform, batch_size=at_once, workers=0)
        viewed = task_features.ViewedFeatures(bench.encoder, bench.task.train, transform, embedding)
        return list(viewed.batches(16, seed, epoch))

    one, same = rows(0, 0, 64), rows(0, 0, 5)
    assert len(one) == 5 and all(len(labels) == 16 for _, labels in one)
    for (a, labels), (b, others) in zip(one, same, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(labels, others)
    assert not torch.equal(one[0][1], rows(0, 1, 64)[0][1])  # another order
    assert not torch.equal(one[0][0], rows(1, 0, 64)[0][0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["near"], "unknown protocol 'near'"),
        (["knn", "RUN", "--data", "folder"], "folder needs the path of its data"),
        (["knn", "RUN", "--data", "fodler"], "unknown task 'fodler'"),
        (["linear", "RUN", "--data", "folder", "--path", "DATA", "--protocol", "imagenet1k"],
         "unknown protocol 'imagenet1k'"),
        (["linear", "RUN", "--data", "folder", "--path", "DATA", "--epochs", "0"],
         "epochs must be at least 1, got 0"),
        (["linear", "RUN", "--data", "folder", "--path", "DATA", "--step-images", "1"],
         "step_images must be at least 2"),
        (["knn", "RUN", "--data", "folder", "--path", "DATA", "--neighbours", "0"],
         "neighbours must be numbers of at least 1"),
        (["knn", "nowhere", "--data", "folder", "--path", "DATA"], "nothing at nowhere"),
        (["knn", "RUN", "--data", "folder", "--path", "DATA", "--train-images", "2"],
         "no image to fit on of class-"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, expected, run, folder, capsys):
    given = [{"RUN": run, "DATA": str(folder)}.get(word, word) for word in arguments]
    assert cli.main(["eval", *given]) == 1
    assert expected in capsys.readouterr().err


def test_help(capsys):
    assert cli.main(["eval"]) == 0 and "lowshot" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", "linear", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for word in ("--protocol", "--solver", "--random-network", "clevr-dist"):
        assert word in shown


def test_the_random_network_has_the_same_sizes(run, folder):
    trained = open_bench(options(KnnOptions, run, folder))
    untrained = open_bench(options(KnnOptions, run, folder, random_network=True))
    assert untrained.encoder.config == trained.encoder.config
    assert untrained.embedding == trained.embedding
    assert untrained.encoder.fingerprint() != trained.encoder.fingerprint()
    again = open_bench(options(KnnOptions, run, folder, random_network=True))
    assert untrained.encoder.fingerprint() == again.encoder.fingerprint()


def test_the_task_of_the_rendered_kind_takes_the_encoders_size(run, monkeypatch):
    asked = []
    task = open_task
    monkeypatch.setattr(
        "ijepa.downstream.evaluation.open_task",
        lambda *a, **k: asked.append(k["image_size"]) or task("cifar10", a[1]),
    )
    with pytest.raises(ValueError, match="needs the path"):
        open_bench(KnnOptions(source=run, data="shapes", encoder=EncoderOptions(image_size=24)))
    assert asked == [(24, 24)]
