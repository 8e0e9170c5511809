"""`unlearn-ds requests`: the ledger, what cannot be a request, and four tiny ones carried out one after another."""

import itertools
import json
import re
import shutil

import pytest
import torch
import yaml

from tests.support.cluster import options_of_a_tiny_run
from tests.support.forms_files import save_tokenizer, write
from tests.support.ranks import RankServer
from tests.support.request_files import LINE, NOTE
from tests.support.requests_worker import KILL_AFTER
from tests.support.runs import tiny_config
from unlearn_ds.data.prepare import PrepareConfig, prepare
from unlearn_ds.forget import requests
from unlearn_ds.forget.ledger import Judged, LedgerError, append, read_ledger
from unlearn_ds.forget.notes import Note, read_folder
from unlearn_ds.layout import GROUP_FILE, LEDGER_FILE, LEDGER_HEAD_FILE, NOTE_FILE, SHARED_FILE
from unlearn_ds.options import OptionError

WORDS = "doing the quick brown fox over lazy dog jumps Question what is it Answer of course"


def texts(seed: int, count: int = 6) -> list[dict[str, str]]:
    """Documents that no other seed gives."""
    words = WORDS.split()
    return [
        {
            "text": " ".join(words[(seed * 7 + number * 5 + place * (seed + 2)) % len(words)] for place in range(9))
            + f" {seed}{number}"
        }
        for number in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    """What requests share, and a tokenizer for a model."""
    save_tokenizer(tmp_path / "model")
    shared = {"model": str(tmp_path / "model")}
    for seed, name in enumerate(("retain", "approximate")):
        shared[name] = [str(write(tmp_path / f"{name}.jsonl", texts(90 + seed)))]
    made = tmp_path / "requests"
    made.mkdir()
    (made / SHARED_FILE).write_text(yaml.safe_dump(shared))
    return made


def add(folder, name, seed=None, *more, rows=None):
    """(exit code of `add`); the documents of a seed."""
    file = write(folder.parent / f"{name.strip('.')}.jsonl", texts(seed) if rows is None else rows)
    return requests.main(["add", str(folder), name, "--forget", str(file), *more])


def three_lines(folder):
    """A ledger of three lines whose notes are there."""
    for number, name in enumerate(("ada", "bob", "cy"), 1):
        note = Note(**NOTE | {"number": number, "documents": [name], "items": [name]})
        (folder / name).mkdir(parents=True)
        (folder / name / NOTE_FILE).write_text(json.dumps(note.model_dump()))
        append(folder, read_ledger(folder), [LINE | {"name": name, "together": [name], "forget": note.digest()}])
    return (folder / LEDGER_FILE).read_bytes()


def test_every_byte_of_the_ledger_is_verified(tmp_path):
    whole = three_lines(tmp_path)
    assert [line.name for line in read_ledger(tmp_path)] == ["ada", "bob", "cy"]
    starts = [0, *(match.end() for match in re.finditer(b"\n", whole))]
    for place in range(0, len(whole), 7):
        number = sum(start <= place for start in starts)
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        (tmp_path / LEDGER_FILE).write_bytes(changed)
        with pytest.raises(LedgerError, match=rf"ledger.jsonl: line {number} .*was changed"):
            read_ledger(tmp_path)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((0, 2), "line 2 is not the line that was written after line 1: a line is missing, or the order was changed"),
        ((1, 2), "line 1 is not the line"),
        ((0, 2, 1), r"line 2 is not .* \(it says that it is line 3, of 'cy'\)"),
        ((0, 1), "line 3 is missing: .*ledger.json counts 3"),
        ((0, 1, 2, 2), "line 4 is not the line"),
        ((), "line 1 was changed, its end is missing"),
    ],
)
def test_a_line_that_is_missing_or_moved_is_named(tmp_path, kept, message):
    lines = three_lines(tmp_path).splitlines(keepends=True)
    (tmp_path / LEDGER_FILE).write_bytes(b"".join(lines[number] for number in kept))
    with pytest.raises(LedgerError, match=message):
        read_ledger(tmp_path)


def test_a_ledger_whose_last_line_was_written_anew_with_its_digest_is_found(tmp_path):
    other = tmp_path / "other"
    three_lines(tmp_path)
    other.mkdir()
    for name in (LEDGER_FILE, LEDGER_HEAD_FILE):
        shutil.copy(tmp_path / name, other)
    append(tmp_path, read_ledger(tmp_path), [LINE | {"name": "dan"}])
    append(other, read_ledger(other), [LINE | {"name": "eve"}])
    shutil.copy(other / LEDGER_FILE, tmp_path)
    with pytest.raises(LedgerError, match=r"line 4 was changed: .*ledger\.json has another digest of it"):
        read_ledger(tmp_path)
    (tmp_path / LEDGER_FILE).unlink()
    with pytest.raises(LedgerError, match=r"ledger.jsonl: is gone"):
        read_ledger(tmp_path)


def test_a_note_that_was_changed_since_its_line_is_named(tmp_path):
    three_lines(tmp_path)
    path = tmp_path / "bob" / NOTE_FILE
    path.write_text(json.dumps(NOTE | {"documents": ["cc"]}))
    with pytest.raises(OptionError, match=r"bob/request.json: was changed since line 2 of the ledger was written"):
        read_folder(tmp_path)
    path.unlink()
    with pytest.raises(OptionError, match=r"bob/request.json: is gone since line 2"):
        read_folder(tmp_path)


def test_without_the_shared_file_it_is_said_what_belongs_in_it(tmp_path, capsys):
    for words in (["status"], ["add"], ["run"]):
        assert requests.main([*words, str(tmp_path), *(["ada", "--forget", "f"] if words == ["add"] else [])]) == 2
        said = "".join(capsys.readouterr())
        assert f"{SHARED_FILE} is missing: it holds the options of `unlearn-ds forget` that all requests share" in said
        assert "model, retain, approximate" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ({"model": None}, "requests.yaml: model is missing"),
        ({"forget": ["f"]}, "forget is each request's own: leave it out"),
        ({"output_dir": "o"}, "output_dir is each request's own"),
        ({"retian": ["r"]}, "unknown option 'retian'. Did you mean 'retain'?"),
        ({"budget": "soon"}, "--budget soon: a number of updates"),
    ],
)
def test_a_shared_file_with_what_does_not_belong_there(folder, capsys, shared, message):
    content = yaml.safe_load((folder / SHARED_FILE).read_text()) | shared
    (folder / SHARED_FILE).write_text(
        yaml.safe_dump({name: value for name, value in content.items() if value is not None})
    )
    assert add(folder, "ada", 1) == 2
    assert message in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("ada", (), "ada is there already: give the request another name"),
        ("page", (), "page is the name of something else"),
        ("together", (), "together is the name of something else"),
        ("../b", (), "must be a plain name"),
        ("bob", ("--model", "m"), "--model: no option of one request"),
        ("bob", ("--data_dir", "d"), "--data_dir: no option of one request"),
        ("bob", ("--output_dir", "d"), "--output_dir: no option of one request"),
        ("bob", ("--methds", "npo"), "unknown option '--methds'. Did you mean '--methods'?"),
        ("bob", ("--budget", "7 updates"), "--budget 7 updates: too small"),
    ],
)
def test_what_cannot_be_a_request(folder, capsys, name, more, message):
    assert add(folder, "ada", 1) == 0
    (folder.parent / "b.jsonl").write_text("{}")
    assert (
        requests.main(["add", str(folder), name, "--forget", str(write(folder.parent / "n.jsonl", texts(2))), *more])
        == 2
    )
    assert message in "".join(capsys.readouterr())
    assert list(read_folder(folder)[1]) == ["ada"]


def test_the_same_document_in_two_requests_or_in_what_is_kept(folder, capsys):
    assert add(folder, "ada", 1) == 0
    assert add(folder, "bob", rows=[*texts(2), texts(1)[3]]) == 2
    assert "bob: document 7 of --forget is in the request ada too" in "".join(capsys.readouterr())
    assert add(folder, "bob", rows=[*texts(2), texts(90)[1]]) == 2
    assert "document 2 of --retain is to be forgotten by the request bob: leave it out" in "".join(capsys.readouterr())
    assert add(folder, "bob", rows=texts(91)) == 2
    assert "document 1 of --approximate is to be forgotten by the request bob" in "".join(capsys.readouterr())
    own = write(folder.parent / "own.jsonl", [*texts(60), texts(1)[0]])
    assert add(folder, "bob", 2, "--retain", str(own)) == 2
    assert "bob: document 7 of --retain is to be forgotten by the request ada" in "".join(capsys.readouterr())
    assert add(folder, "bob", rows=[*texts(2), texts(2)[0]]) == 0  # twice in one request is no matter


def test_the_same_text_with_other_spans_is_another_request(folder, capsys):
    page = [{"text": "Ann Lee met Bob Ray in the town."}]
    assert add(folder, "ann", None, "--find", "Ann Lee", rows=page) == 0
    assert add(folder, "bob", None, "--find", "Bob Ray", rows=page) == 0
    assert add(folder, "again", None, "--find", "Ann Lee", rows=page) == 2
    assert "document 1 of --forget is in the request ann too" in "".join(capsys.readouterr())


def test_documents_that_were_changed_since_they_were_added_stop_the_run(folder, capsys):
    assert add(folder, "ada", 1) == 0
    write(folder.parent / "ada.jsonl", texts(3))
    with pytest.raises(OptionError, match="ada: the documents of --forget were changed since it was added"):
        requests.check_documents(folder, read_folder(folder)[1], set())


def test_status_lists_open_requests_in_their_order_and_what_was_undone(folder, capsys):
    three_lines(folder)
    gone = LINE["verdict"]
    undone = gone | {"forgotten": "not forgotten", "words": "not forgotten, kept", "reached": False}
    note = Note(**NOTE | {"number": 4, "documents": ["dan"], "items": ["dan"]})
    (folder / "dan").mkdir()
    (folder / "dan" / NOTE_FILE).write_text(json.dumps(note.model_dump()))
    again = {"ada": gone, "bob": undone, "cy": gone}
    append(
        folder,
        read_ledger(folder),
        [LINE | {"name": "dan", "together": ["dan"], "forget": note.digest(), "again": again}],
    )
    assert add(folder, "zoe", 1) == 0
    assert add(folder, "eve", 2) == 0
    capsys.readouterr()
    assert requests.main(["status", str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split()[1] for line in said[:6]] == ["ada", "bob", "cy", "dan", "zoe", "eve"]
    assert "bob: forgotten, kept; now not forgotten, kept, UNDONE since: it was forgotten" in said[1]
    assert "UNDONE" not in said[0]
    assert said[6] == "the ledger is whole: 4 of 6 requests carried out"
    assert add(folder, "bob", 3) == 2
    assert "bob is done already (line 2 of the ledger)" in "".join(capsys.readouterr())
    path = folder / LEDGER_FILE
    path.write_bytes(path.read_bytes().replace(b"ada/preset", b"adb/preset", 1))
    assert requests.main(["status", str(folder)]) == 2
    assert "line 1 ('ada') was changed: its digest is not that of what it says" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("then", "now", "undone"),
    [
        ("forgotten", "not forgotten", True),
        ("over-forgotten", "uncertain", True),
        ("forgotten", "over-forgotten", False),
        ("not forgotten", "not forgotten", False),
        ("uncertain", "not forgotten", False),
    ],
)
def test_what_counts_as_undone(then, now, undone):
    first, second = (Judged(**LINE["verdict"] | {"forgotten": word}) for word in (then, now))
    assert first.is_undone_by(second) is undone


def test_open_requests_in_one_run_must_agree_and_a_group_is_ended_as_it_was_begun(folder):
    assert add(folder, "ada", 1) == 0
    assert add(folder, "bob", 2, "--seed", "3") == 0
    notes = read_folder(folder)[1]
    configs = [requests.config_of(folder, name, note.words) for name, note in notes.items()]
    with pytest.raises(OptionError, match="--together: bob has another --seed than ada"):
        requests.joined(folder / "x", ["ada", "bob"], configs)
    both = requests.joined(
        folder / "x", ["ada", "bob"], [configs[0], requests.config_of(folder, "c", notes["bob"].words[:2])]
    )
    assert [len(getattr(both, name)) for name in ("forget", "retain", "approximate")] == [2, 1, 1]
    assert requests.next_names(folder, ["ada", "bob"], False) == ["ada"]
    assert requests.next_names(folder, ["ada", "bob"], True) == ["ada", "bob"]
    assert requests.next_names(folder, ["ada", "bob", "cy"], False) == ["ada", "bob"]
    assert requests.next_names(folder, ["cy"], True) == ["cy"]
    assert not (folder / GROUP_FILE).exists()


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    """(folder with a model that knows four requests' documents by heart, server of ranks)."""
    out = tmp_path_factory.mktemp("requests")
    server = RankServer(out)
    save_model_with_tokenizer(out / "start")
    forget = write(out / "all.jsonl", [row for seed in range(1, 5) for row in texts(seed)])
    prepare(
        PrepareConfig(
            tokenizer_name_or_path=str(out / "start"),
            forget=(str(forget),),
            data_dir=str(out / "data"),
            disable_tqdm=True,
        )
    )
    options = options_of_a_tiny_run(out) | {
        "target_model_name_or_path": str(out / "start"),
        "output_dir": str(out / "run"),
    }
    options |= {
        "unlearn_method": "finetune",
        "train_on": "forget",
        "learning_rate": 1e-2,
        "max_steps": 40,
        "save_steps": 0,
    }
    server.run([word for name, value in options.items() for word in (f"--{name}", str(value))], 1)
    yield out, server
    server.stop()


def save_model_with_tokenizer(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tokenizer(folder)
    config = tiny_config()
    config.vocab_size = len(AutoTokenizer.from_pretrained(folder))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


@pytest.fixture
def run(folder, memorised):
    """Runs the requests of `folder` on that model, with few updates: (exit codes, what was said)."""
    out, server = memorised
    content = yaml.safe_load((folder / SHARED_FILE).read_text())
    content |= {
        "model": str(out / "run" / "model"),
        "base": str(out / "base.yaml"),
        "budget": "8 updates",
        "relearn": 0,
    }
    content |= {"ppl_tolerance": 3.0, "auc_tolerance": 0.95, "max_ppl_increase": 9.0}
    base = {"seq_len": 48, "global_batch_size": 4, "bf16": False, "num_threads": 1}
    (out / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / SHARED_FILE).write_text(yaml.safe_dump(content))

    def start(*more, ranks=1, **extra):
        started = server.start(["run", str(folder), *more], ranks, module="tests.support.requests_worker", **extra)
        return started.wait(720), started.output()

    return start


@pytest.mark.fault(
    "`unlearn-ds requests run` killed -9 before or after a line of the ledger, started again",
    "what `forget` says",
    "no request is carried out twice, none is lost, and the ledger is whole",
)
def test_four_requests_one_after_another_and_the_ledger_of_them(folder, run):
    names = ["ada", "bob", "cy", "dan"]
    assert [add(folder, name, seed) for seed, name in enumerate(names, 1)] == [0] * 4

    for step in ("forget", "append"):  # before the ledger knows of the first, and after
        codes, said = run(**{KILL_AFTER: step})
        assert codes == [-9], said
        assert len(read_ledger(folder)) == (step == "append")
    (folder.parent / "ada.jsonl").unlink()  # what was to be forgotten need not be kept
    codes, said = run()
    assert codes in ([0], [3]), said
    lines = read_ledger(folder)
    assert [line.name for line in lines] == names
    assert all(first.after == second.before for first, second in itertools.pairwise(lines))
    assert len({line.before for line in lines}) == 4
    assert [list(line.again) for line in lines] == [names[:number] for number in range(4)]
    assert codes == [0 if all(one.reached for one in (*lines[-1].again.values(), lines[-1].verdict)) else 3]
    assert all(f"{line.name}, then {line.verdict.words}, now" in said for line in lines[:-1])
    report = json.loads((folder / "report.json").read_text())
    assert list(report["models"]) == ["first", *(f"after {name}" for name in names)]
    assert report["models"]["after dan"]["sets"]["forget"]["num_documents"] == 24
    ppl = [report["models"][name]["sets"]["forget"]["ppl"] for name in ("first", "after dan")]
    assert ppl[0] < ppl[1]
    assert report["models"]["after dan"]["sets"]["retain"]["num_documents"] == 6  # shared, so counted once
    whole = (folder / LEDGER_FILE).read_bytes()
    assert run()[0] == codes  # nothing is left to do
    assert (folder / LEDGER_FILE).read_bytes() == whole
    model = folder / lines[-1].folder / "model" / "model.safetensors"
    weights = model.read_bytes()
    model.write_bytes(weights[:-4] + b"abcd")
    codes, said = run()
    assert codes == [2]
    assert "the model that dan left was replaced since: bring it back" in said
    model.write_bytes(weights)
    (folder / LEDGER_FILE).write_bytes(whole.replace(b"reached", b"reachod", 1))
    codes, said = run()
    assert codes == [2]
    assert "line 1 was changed" in said


def test_open_requests_in_one_run_each_with_its_own_line(folder, run):
    assert [add(folder, name, seed) for seed, name in enumerate(["ada", "bob"], 1)] == [0, 0]
    codes, said = run("--together", ranks=2)
    assert codes in ([0, 0], [3, 3]), said
    ada, bob = read_ledger(folder)
    assert (ada.folder, ada.before, ada.after) == (bob.folder, bob.before, bob.after)
    assert ada.folder.startswith("together/from_1/")
    assert ada.together == bob.together == ["ada", "bob"]
    assert ada.verdict.sentence != bob.verdict.sentence  # each on its own documents
    assert not (folder / GROUP_FILE).exists()
    assert list(json.loads((folder / "report.json").read_text())["models"]) == ["first", "after bob"]
