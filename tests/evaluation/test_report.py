"""The report: its files, its command, its errors, and the page in a real browser."""

import json
import re
import shutil

import matplotlib.image
import numpy as np
import pytest

from tests.support.cluster import require
from tests.support.evaluations import random_tables, save_evaluation, save_models
from tests.support.patience import finish
from unlearn_ds.evaluation.report import main, write_report
from unlearn_ds.evaluation.report_page import mood
from unlearn_ds.plots.models import draw_tradeoff
from unlearn_ds.plots.style import colours, new_figure, to_svg
from unlearn_ds.stored import StoredError

CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=NetworkTimeServiceQuerying",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def report_dir(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, models, original="original", retrained="retrained", title="A <report> & its title")
    return folder


def browse(page, folder, *flags):
    """Open a page in headless Chromium and return what it printed."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    require([] if browser else ["chromium"])
    command = [browser, *CHROMIUM, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    finished = finish(command)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished


def test_json_holds_what_other_tools_read(report_dir, models):
    report = json.loads((report_dir / "report.json").read_text())
    assert list(report["models"]) == list(models)
    for name in ("original", "retrained", "gradient_ascent"):
        for which in ("forget", "approximate", "retain", "general"):
            assert {"ppl", "acc"} <= report["models"][name]["sets"][which].keys()
        assert 0 <= report["models"][name]["mia"]["min_k_40"]["auc"] <= 1
    words = {name: (one["verdict"]["forgotten"], one["verdict"]["kept"]) for name, one in report["models"].items()}
    assert words == {
        "original": ("not forgotten", "kept"),
        "retrained": ("forgotten", "kept"),
        "ascent_plus_descent": ("forgotten", "kept"),
        "adversarial": ("not forgotten", "kept"),
        "gradient_ascent": ("over-forgotten", "damaged"),
        "random_label": ("broken", "kept"),
    }
    assert "reference" in report["models"]["adversarial"]["mia"]
    assert "reference" not in report["models"]["original"]["mia"]


@pytest.mark.parametrize(
    ("forgotten", "possible", "kept", "colour"),
    [
        ("forgotten", ["forgotten"], "kept", "good"),
        ("forgotten", ["forgotten"], "uncertain", "warn"),
        ("uncertain", ["forgotten", "over-forgotten"], "kept", "warn"),
        ("forgotten", ["forgotten"], "damaged", "warn"),
        ("uncertain", ["forgotten", "over-forgotten"], "damaged", "warn"),
        ("uncertain", ["not forgotten", "over-forgotten"], "damaged", "bad"),
        ("not forgotten", ["not forgotten"], "damaged", "bad"),
        ("over-forgotten", ["over-forgotten"], "damaged", "bad"),
    ],
)
def test_the_colour_follows_the_words(forgotten, possible, kept, colour):
    assert mood({"forgotten": forgotten, "possible": possible, "kept": kept}) == colour


@pytest.mark.parametrize(("word", "colour"), [("broken", "bad"), ("unknown", "warn")])
def test_the_colour_of_a_model_without_a_word_for_forgetting(word, colour):
    assert mood({"forgotten": word, "kept": "kept"}) == colour


def test_words_and_colour_stand_in_the_page(tmp_path):
    """Retraining cost 16 % on retain: who equals it is green; who is in doubt is neither green nor red."""
    original, retrained = random_tables(forget=0.8), random_tables(forget=2.05, retain=2.15)
    torn = random_tables(forget=2.05)
    torn["general"]["log_prob"] -= np.linspace(-0.6, 0.8, 40)
    made = {"original": original, "retrained": retrained, "torn": torn}
    folders = {name: save_evaluation(tmp_path / name, tables) for name, tables in made.items()}
    write_report(tmp_path, folders, original="original", retrained="retrained")
    page = (tmp_path / "report.html").read_text()
    assert '<span class="good-text">forgotten, kept</span>' in page
    assert '<span class="warn-text">forgotten, domain kept, general uncertain</span>' in page
    assert '<li class="warn"><b>torn:</b> Forgotten, domain kept, general uncertain: ' in page
    assert "above that of the worse of original and retrained" in page
    assert "| torn | forgotten, domain kept, general uncertain |" in (tmp_path / "report.md").read_text()


def test_markdown_table_has_a_row_per_model(report_dir, models):
    lines = (report_dir / "report.md").read_text().splitlines()
    assert len(lines) == 2 + len(models)
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith("| gradient_ascent | over-forgotten, damaged |") for line in lines)


def test_page_is_one_file_that_asks_for_nothing(report_dir):
    page = (report_dir / "report.html").read_text()
    assert len(page) < 3_000_000
    assert "A &lt;report&gt; &amp; its title" in page
    assert "<script" not in page
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+", page))
    assert addresses <= {"http://www.w3.org"}  # the name of SVG's vocabulary, which nobody fetches
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for used in re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", page):
        assert "".join(used) in ids


def test_page_forbids_itself_what_it_does_not_need(report_dir, tmp_path):
    """The policy in its head is alive: something fetched or run would be refused, and the console would say so."""
    foreign = report_dir / "foreign.html"
    added = '<img src="https://example.org/x.png"><script>document.title = "ran"</script></body>'
    foreign.write_text((report_dir / "report.html").read_text().replace("</body>", added))
    opened = browse(foreign, tmp_path, "--dump-dom")
    assert opened.stderr.count("violates the following Content Security Policy") == 2
    assert "<title>ran" not in opened.stdout


def test_page_opens_in_a_browser_without_errors_or_requests(report_dir, tmp_path):
    page = report_dir / "report.html"
    opened = browse(page, tmp_path, f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom")
    assert "CONSOLE" not in opened.stderr
    for plot in ("tradeoff", "roc", "losses", "forget_loss", "retain_loss"):
        assert re.search(rf'<figure id="plot-{plot}"><svg', opened.stdout), plot
    requests = set(re.findall(r'"url":"([^"]+)"', (tmp_path / "net.json").read_text()))
    own = re.compile(r"file:|data:|chrome|https?://[^/]*\.(google|googleapis|gvt1)\.com/")  # the browser's own errands
    assert not {url for url in requests if not own.match(url)}


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_its_window_and_the_plots_are_drawn(report_dir, tmp_path, width):
    probe = report_dir / "probe.html"  # the page, reporting its own layout in its title
    script = (
        "<script>document.title = JSON.stringify({page: document.documentElement.scrollWidth, window: innerWidth,"
        "plots: [...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.clientHeight,"
        "s.querySelectorAll('path').length])})</script></body>"
    )
    page = (report_dir / "report.html").read_text().replace("default-src 'none'", "default-src 'unsafe-inline'")
    probe.write_text(page.replace("</body>", script))
    dom = browse(probe, tmp_path, f"--window-size={max(width, 500)},900", "--dump-dom").stdout
    layout = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert layout["page"] <= layout["window"]
    assert len(layout["plots"]) == 5
    assert all(w > 200 and h > 100 and paths > 5 for w, h, paths in layout["plots"])
    picture = tmp_path / "page.png"
    browse(report_dir / "report.html", tmp_path, f"--window-size={width},1200", f"--screenshot={picture}")
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (1200, width)
    assert np.ptp(pixels[..., :3]) > 0.5


@pytest.mark.parametrize("extreme", [45.0, 1e300])
def test_tradeoff_axes_fit_the_points(extreme):
    points = {"original": (30.0, 30.2), "retrained": (113.0, 32.2), "destroyed": (150.0, extreme)}
    figure, (axes,) = new_figure()
    draw_tradeoff(axes, points, colours(list(points)), target=113.0, limit=33.2)
    to_svg(figure, "tradeoff", "")
    for limits, values in ((axes.get_xlim(), (30.0, 150.0)), (axes.get_ylim(), (30.2, min(extreme, 10 * 32.2)))):
        low, high, first, last = np.log10([*limits, *values])
        assert low < first < last < high
        assert last - first > 0.6 * (high - low)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("destroyed (further out)" in labels) == (extreme > 1e3)


def test_command_compares_runs_and_prints_verdicts(models, tmp_path, capsys):
    runs = [str(models[name]) for name in ("original", "adversarial")]
    assert main([*runs, "--original", "original", "--output_dir", str(tmp_path / "out")]) == 0
    assert "adversarial: Not forgotten, kept" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["models"]["adversarial"]["verdict"]["yardstick"] == "the original model on unseen documents"


def test_thresholds_are_stated_and_decide(models, tmp_path):
    runs = [str(models[name]) for name in ("original", "gradient_ascent")]
    limits = ["--ppl_tolerance", "5000", "--auc_tolerance", "0.9", "--max_ppl_increase", "99"]
    assert main([*runs, "--original", "original", "--output_dir", str(tmp_path), *limits]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["thresholds"] == {"ppl_tolerance": 5000, "auc_tolerance": 0.9, "max_ppl_increase": 99}
    verdict = report["models"]["gradient_ascent"]["verdict"]
    assert (verdict["forgotten"], verdict["kept"]) == ("forgotten", "kept")
    assert "9900.0 %" in (tmp_path / "report.html").read_text()


def test_one_run_alone_is_held_against_its_own_unseen_documents(tmp_path):
    folder = save_evaluation(tmp_path / "run", random_tables(forget=0.5))
    assert main([str(folder)]) == 0
    verdict = json.loads((folder / "report.json").read_text())["models"]["run"]["verdict"]
    assert (verdict["forgotten"], verdict["kept"]) == ("not forgotten", "unknown")
    assert verdict["yardstick"] == "the same model on unseen documents"


def test_what_a_guard_did_stands_beside_the_verdict(tmp_path):
    event = "stopped after update 3: retain perplexity 47 is above 31, 10% over the start"
    folder = save_evaluation(tmp_path / "run", random_tables(), [{"step": 3, "event": event}])
    assert main([str(folder)]) == 0
    verdict = (folder / "report.html").read_text().split('<section id="models">')[0]
    assert f"In training: {event}." in verdict


def test_runs_of_the_same_folder_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        save_evaluation(tmp_path / parent / "run", random_tables(count=10))
    assert main([str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]) == 0
    assert list(json.loads((tmp_path / "a/run/report.json").read_text())["models"]) == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run given: unlearn-ds report RUN"),
        (["{root}/absent"], "no such folder"),
        (["{root}/empty"], r"empty holds no evaluation .*unlearn-ds evaluate --model_name_or_path"),
        (["{run}", "--original", "orignal", "--names", "original"], "--original orignal: .*Did you mean 'original'"),
        (["{run}", "--names", "a", "b"], "--names: 2 names for 1 runs"),
        (["{run}", "{run}"], "the same folder is given twice"),
        (["{run}", "--ppl_tolerance", "0"], "--ppl_tolerance 0.0: must be above 0"),
        (["{run}", "--colour", "red"], "unknown option '--colour'"),
    ],
)
def test_wrong_use_is_explained(models, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    words = [word.format(root=tmp_path, run=models["original"]) for word in words]
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_damaged_evaluation_is_named(tmp_path):
    folder = save_evaluation(tmp_path / "run", random_tables(count=10))
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(StoredError, match=r"evaluation\.json: is not valid JSON .*: make it again"):
        write_report(tmp_path, {"run": folder})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluation.json", {"sets": []}, r"evaluation\.json: sets: is an empty list, must be an object"),
        ("quantize.json", {"int4": {"sets": {"forget": 3}}}, r"quantize\.json: int4\.sets\.forget: is 3, must be an"),
        ("relearn.json", {"updates": 8, "before": {"sets": {}}}, r"relearn\.json: before\.sets\.forget: is missing"),
        ("generation.json", {"rouge_l": "0.5"}, r'generation\.json: rouge_l: is "0\.5", must be a number'),
        ("tasks.json", {"results": {"arc": [1]}}, r"tasks\.json: results\.arc: is a list, must be an object"),
        ("run.json", {"corpora": [7]}, r"run\.json: corpora\.0: is 7, must be an object"),
        ("run.json", [], r"run\.json: is an empty list, must be an object"),
    ],
)
def test_a_file_of_a_run_with_wrong_types_is_named(tmp_path, capsys, file, content, message):
    folder = save_evaluation(tmp_path / "run", random_tables(count=10))
    (folder / file).write_text(json.dumps(content))
    assert main([str(folder)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(message, said)


def test_bad_lines_of_metrics_are_said_and_the_curves_drawn_from_the_others(tmp_path, capsys):
    rows = [{"step": step, "forget_loss": 1.0 + step} for step in range(1, 5)]
    folder = save_evaluation(tmp_path / "run", random_tables(count=10), rows)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], "7", '{"step": 3, "forget', *lines[2:], ""]))
    assert main([str(folder)]) == 0
    said = capsys.readouterr().err
    assert "metrics.jsonl: line 3: is 7, must be an object: this line is left out" in said
    assert "metrics.jsonl: line 4: is not valid JSON" in said
    assert "Training: loss on forget" in (folder / "report.html").read_text()
