"""Any string is a name: in the page, its pictures, the Markdown table, the terminal and the model card."""

import html
import json
import re
from dataclasses import asdict

import pytest

from tests.support.evaluations import random_tables, save_evaluation
from tests.support.names import NAMES, ODD_NAMES, paragraphs, table_cells
from unlearn_ds.config import RunConfig
from unlearn_ds.evaluation.report import main, write_report
from unlearn_ds.markup import visible
from unlearn_ds.measures.card import HEADING, update_card
from unlearn_ds.measures.roc import save_roc
from unlearn_ds.plots.benchmarks import plot_kernels, plot_step
from unlearn_ds.plots.style import to_svg
from unlearn_ds.run.export import model_card

EVERY = NAMES | ODD_NAMES


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of a model per name, each with the losses of a run's updates and a task of that name."""
    root = tmp_path_factory.mktemp("named")
    steps = [{"step": step, "forget_loss": 1.0 + step, "retain_loss": 1.0} for step in (1, 2)]
    models = {}
    for number, name in enumerate(EVERY.values()):
        run = {"options": {"domain": name, "train_on": [name]}, "versions": {name: name}, "model_fingerprint": name}
        models[name] = save_evaluation(root / str(number), random_tables(count=6, forget=1 + number / 10), steps, run)
    (root / "0" / "tasks.json").write_text(json.dumps({"results": {name: {"acc": 0.5} for name in EVERY.values()}}))
    write_report(root, models, original=EVERY["formula"], title=EVERY["script"])
    return root


def of_svg(page: str, plot: str) -> list[str]:
    """The texts of a plot in a page."""
    (svg,) = re.findall(rf'<figure id="plot-{plot}">(<svg.*?</svg>)', page, re.DOTALL)
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)]


@pytest.mark.parametrize("name", EVERY.values(), ids=EVERY)
def test_page_and_table_show_every_name(report, name):
    page = (report / "report.html").read_text()
    assert (
        f"<summary>{html.escape(visible(name))}</summary>".replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page
    )
    assert visible(name) in [row[0] for row in table_cells((report / "report.md").read_text())]
    assert name in json.loads((report / "report.json").read_text())["models"]


@pytest.mark.parametrize("plot", ["tradeoff", "roc", "losses", "forget_loss", "retain_loss"])
def test_legends_show_every_name_but_the_original_s_curve(report, plot):
    page = (report / "report.html").read_text()
    texts = of_svg(page, plot)
    whole = "".join(texts)
    for name in EVERY.values():
        if plot.endswith("_loss") and name == EVERY["formula"]:
            continue  # the original's training is not shown
        assert visible(name) in (whole if len(name) > 40 else texts), name


def test_page_has_no_markup_of_a_name_and_no_control_characters(report):
    page = (report / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)
    assert "<b>a</b>" not in page


def test_every_row_of_the_table_has_its_cells(report):
    rows = table_cells((report / "report.md").read_text())
    assert len(rows) == len(EVERY)
    assert {len(row) for row in rows} == {8 + len(EVERY)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x", "x"], "--names: 'x' stands there twice: every run needs a name of its own"),
        (["x", " "], "--names: a name is empty"),
    ],
)
def test_names_that_tell_nothing_apart_are_refused(tmp_path, capsys, names, message):
    for run in ("1", "2"):
        save_evaluation(tmp_path / run, random_tables(count=6))
    assert main([str(tmp_path / "1"), str(tmp_path / "2"), "--names", *names]) == 2
    assert message in capsys.readouterr().err


def test_the_command_says_one_line_for_each_model(tmp_path, capsys):
    for number in range(len(EVERY)):
        save_evaluation(tmp_path / str(number), random_tables(count=6))
    runs = [str(tmp_path / str(number)) for number in range(len(EVERY))]
    capsys.readouterr()
    assert main([*runs, "--names", *EVERY.values(), "--output_dir", str(tmp_path / "-out\x1b[2J")]) == 0
    lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert len(lines) == len(EVERY) + 1
    assert "\x1b" not in "".join(lines)


def test_folders_are_named_after_themselves(tmp_path):
    named = {
        name: save_evaluation(tmp_path / name, random_tables(count=6)) for name in EVERY.values() if "/" not in name
    }
    assert main([*map(str, named.values()), "--output_dir", str(tmp_path / "out")]) == 0
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["models"]) == list(named)


@pytest.mark.parametrize("value", EVERY.values(), ids=EVERY)
def test_a_card_shows_every_option_and_its_evaluation_replaces_none(tmp_path, value):
    given = {"tokenizer_name_or_path": value, "output_dir": value, "run_name": f"{value}\n## Evaluation\n"}
    given["target_model_name_or_path"] = value
    options = asdict(RunConfig("gradient_ascent", "out", target_model_name_or_path="model")) | given
    card = model_card(options, [{"role": value, "name": value, "documents": 1, "tokens": 2, "digest": "feed"}], None)
    folder = save_evaluation(tmp_path / "run", random_tables(count=6)) / "model"
    folder.mkdir()
    (folder / "README.md").write_text(card)
    update_card(folder.parent)
    text = (folder / "README.md").read_text()
    assert text.split("\n").count(HEADING) == 1
    assert "Not evaluated" not in text
    rows = table_cells(text)
    assert [visible(value), visible(value), "1", "2", "feed"] in rows
    for name in options.keys() & {*given, "seed", "warmup_ratio"}:
        assert [name, visible(options[name])] in rows, name
    assert f"Start: {visible(value)}." in paragraphs(text)


@pytest.mark.parametrize("extra", ["## Evaluation", "text\n## Evaluation of others"])
def test_what_stands_before_the_evaluation_stays(tmp_path, extra):
    folder = save_evaluation(tmp_path / "run", random_tables(count=6)) / "model"
    folder.mkdir()
    (folder / "README.md").write_text(f"unlearn-ds\n\n{extra}\n\nmine\n\n{HEADING}\n\nNot evaluated\n")
    update_card(folder.parent)
    text = (folder / "README.md").read_text()
    assert f"{extra}\n\nmine\n\n{HEADING}\n\n|" in text


def test_pictures_of_benchmarks_show_every_name_once(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("unlearn_ds.plots.benchmarks.save_png", lambda figure, path: shown.append(figure))
    rows = [
        {"name": name, "impl": name, "shape": {name: 1}, "median_ms": 1.0, "percent_of_products": 50}
        for name in EVERY.values()
    ]
    plot_kernels([*rows, *rows], tmp_path / "a.png")
    step = {"reference": None, "tokens_per_s": 2, "tokens_per_s_p20_p80": (1, 3), "peak_mem_bytes": 2**30}
    plot_step([{"name": name, "impl": "ours"} | step for name in EVERY.values()], tmp_path / "b.png")
    for figure in shown:
        to_svg(figure, "drawn", "")
    assert len(shown[0].axes) == len(EVERY)
    assert len(shown[0].axes[0].patches) == 2, "bars of one name are bars of their own"
    labels = ["".join(label.get_text().split("\n")[:-1]) for label in shown[1].axes[0].get_yticklabels()]
    assert [label.replace(r"\$", "$") for label in labels] == list(map(visible, EVERY.values()))


def test_attacks_are_drawn_in_colours_of_their_own(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("unlearn_ds.measures.roc.save_png", lambda figure, path: shown.append(figure))
    save_roc(tmp_path / "roc.png", random_tables(count=20))
    (axes,) = shown[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == len(axes.lines) - 1 > 2
    assert all(re.fullmatch(r"\w+ \(AUC [\d.]+\)", label) for label in labels)
    assert len({line.get_color() for line in axes.lines}) == len(axes.lines)
