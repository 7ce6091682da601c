"""`ijepa report` and `ijepa visualize`: the page refers to no network, escapes what it is given,
and is looked at in a browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import photographs, small_recipe

from ijepa import cli
from ijepa.downstream.seeing.report import distinct_names
from ijepa.report.page.html import PagePicture, PageRun, render_page
from ijepa.report.page.series import MOST_POINTS, line_of
from ijepa.report.page.settings import differing_settings, flat_settings
from ijepa.report.probes import read_probes
from ijepa.train.pretrain import pretrain

EVIL = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported")
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        recipe = small_recipe(
            folder / name, train__steps=4, monitor__every=2, monitor__evaluate=True,
            schedule__peak_lr=rate,
        )  # fmt: skip
        pretrain(recipe)
    return [str(folder / "a"), str(folder / "b")]


class Page(HTMLParser):
    """Tags, attributes and text by tag of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], {}
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)


def check_loads_nothing(text):
    page = Page(text)
    loading = {"link", "iframe", "object", "embed", "video", "audio", "source", "base", "form"}
    assert not loading & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "data", "action", "poster"):
                assert tag == "img" and value.startswith("data:image/")
            if name == "href":
                assert value.startswith("#")
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;") and "http" not in policy
    style, script = "".join(page.text["style"]), "".join(page.text["script"])
    assert "url(" not in style and "@import" not in style
    for word in ("fetch", "XMLHttp", "WebSocket", "import(", "sendBeacon", "innerHTML", "eval("):
        assert word not in script
    # The one address is the name of SVG's elements.
    addresses = set(re.findall(r"https?://[^\s\"'<]+", script + style))
    assert addresses == {"http://www.w3.org/2000/svg"}
    return page


def test_two_runs_make_one_file_that_loads_nothing(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", *runs, "--out", str(out), "--gallery", "20"]) == 0
    text = out.read_text()
    assert out.stat().st_size < 5e6
    page = check_loads_nothing(text)
    headings = page.text["h2"]
    for heading in ("Curves", "Collapse panel", "Accuracy on held-out images", "PCA maps",
                    "Nearest neighbours", "Attention", "Predictor", "Masks", "Settings",
                    "Machine and versions"):  # fmt: skip
        assert heading in headings
    assert "is not drawn" not in text and "cannot be read" not in text
    cells = page.text["td"]
    assert "schedule.peak_lr" in cells and "0.001" in cells and "0.002" in cells
    assert "torch" in cells and "processor" in cells
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) >= 10
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))
    assert {line["run"] for line in data["charts"][0]["lines"]} == {0, 1}
    assert str(out) in capsys.readouterr().out


def test_the_closing_table_is_kept_for_programs(runs):
    probes = read_probes(Path(runs[0]))
    assert probes is not None and set(probes.chance) == {"shape"}
    assert any(row.features.startswith("pretrained") for row in probes.rows)


def test_what_a_run_says_is_text(tmp_path):
    """Whatever a folder holds comes out as words: as names, keys, values, in JSON and captions."""
    run = PageRun(
        EVIL,
        [{"step": 1, "loss": 1.0, EVIL: 2.0}, {"step": 2, "loss": float("nan"), EVIL: "text"},
         {"step": EVIL, "loss": 3}, {"step": 3, "loss": 10**400}],
        {EVIL: {EVIL: EVIL}, "model": EVIL, "train": {"steps": [EVIL]}},
        versions={EVIL: EVIL}, machine={EVIL: EVIL}, notes=[EVIL],
    )  # fmt: skip
    picture = PagePicture(EVIL, EVIL, EVIL, "png", b"x", (9, 9))
    text = render_page([run, run], [picture], EVIL)
    page = check_loads_nothing(text)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert EVIL in "".join(page.text["h1"])  # shown, as text


def test_damaged_folders_are_noted(tmp_path):
    folder = tmp_path / "broken"
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000001" / "checkpoint.json").write_text("{")
    (folder / "recipe.json").write_text("[1]")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n[3]\n{"st')
    (folder / "probes.json").write_text('{"chance": {"x": 7}, "rows": []}')
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    for note in ("recipe.json cannot be read", "probes.json cannot be read", "an accuracy must lie",
                 "the checkpoint cannot be read"):  # fmt: skip
        assert note in text
    check_loads_nothing(text)


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "absent")]) == 1
    assert "is no folder" in capsys.readouterr().err


def test_long_logs_are_thinned_to_means():
    metrics = [{"step": step, "loss": float(step)} for step in range(5001)]
    line = line_of(metrics, "loss", 0)
    assert line is not None and 500 < len(line.steps) <= MOST_POINTS and line.many
    np.testing.assert_allclose(line.steps, line.values)  # means of equal parts
    assert line_of(metrics, "lr", 0) is None


def test_settings_that_differ_are_listed():
    a = flat_settings({"train": {"steps": 5, "seed": 1}, "name": "x"})
    b = flat_settings({"train": {"steps": 6, "seed": 1}, "name": "x", "new": {"key": None}})
    assert differing_settings([a, b]) == [["new.key", "", "null"], ["train.steps", "5", "6"]]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert distinct_names(folders) == ["x/run", "y/run"]
    assert distinct_names(folders[:1]) == ["run"]
    assert len(set(distinct_names([tmp_path, tmp_path]))) == 2


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["masks"], ["masks-packed", "masks-truncate", "masks-coverage"]),
        (["pca", "--random-network"], ["pca"]),
        (["pca", "--remove-position"], ["pca-content"]),
        (["attention", "--block", "0", "--place", "1"], ["attention"]),
        (["neighbours", "--gallery", "12", "--random-network"], ["neighbours"]),
        (["predictor"], ["predictor"]),
    ],
)
def test_pictures_are_written(runs, tmp_path, arguments, files, capsys):
    what, *rest = arguments
    out = tmp_path / "out"
    assert cli.main(["visualize", what, runs[0], *rest, "--out", str(out), "--count", "3"]) == 0
    assert sorted(path.stem for path in out.iterdir()) == sorted(files)
    for path in out.iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 5
    assert "shapes never trained on" in capsys.readouterr().out or what == "masks"


def test_a_folder_of_images_is_looked_at(runs, tmp_path, capsys):
    photographs(tmp_path / "photos", 4, classes=1)
    arguments = ["pca", *runs, "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    assert cli.main(["visualize", *arguments]) == 0
    told = capsys.readouterr().out
    assert "images in " in told and "a basis for each column" in told
    checkpoints = sorted((Path(runs[0]) / "checkpoints").glob("step-*"))
    assert cli.main(["visualize", "pca", *map(str, checkpoints), "--out", str(tmp_path)]) == 0
    assert "one basis for all columns" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--block", "9"], "block must be in -2 to 1, got 9"),
        (["attention", "--place", "2"], "place must lie in [0, 1]"),
        (["masks", "--count", "0"], "count must be at least 1"),
    ],
)
def test_bad_wishes_are_explained(runs, tmp_path, arguments, message, capsys):
    what, *rest = arguments
    assert cli.main(["visualize", what, runs[0], *rest, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    ("size", "scheme"), [((1200, 1400), 1), ((1200, 1400), 0), ((500, 1400), 1)],
    ids=["desk", "dark", "phone"],
)  # fmt: skip
def test_a_browser_draws_the_curves(runs, tmp_path, size, scheme):
    assert CHROMIUM is not None
    out = tmp_path / "page.html"
    cli.main(["report", *runs, "--out", str(out), "--no-pictures"])
    shot = tmp_path / "shot.png"
    subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={size[0]},{size[1]}", f"--blink-settings=preferredColorScheme={scheme}",
         "--virtual-time-budget=3000", f"--screenshot={shot}", out.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    paper = [255, 255, 255] if scheme else [0x12, 0x18, 0x1E]
    assert (np.abs(pixels[5, 5] - paper) <= 2).all()
    assert (np.abs(pixels[:, -3:] - paper).max(axis=2) <= 2).all()  # nothing runs over the edge
    lines = [[0x1F, 0x77, 0xB4], [0xD9, 0x54, 0x1E]]
    if not scheme:
        lines = [[0x5D, 0xAD, 0xE2], [0xFF, 0x8A, 0x5B]]
    for colour in lines:  # each run's curves, which the script alone draws
        assert (np.abs(pixels[200:] - colour).sum(axis=2) < 12).sum() > 300
