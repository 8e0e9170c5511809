"""Every command with every name: of models, domains, files, run folders, runs in a report, values and folders of a sweep."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.support.names import NAMES, table_cells
from tests.support.ranks import RankServer
from tests.support.runs import tiny_config
from unlearn_ds import cli
from unlearn_ds.demo.data import write_tokenizer
from unlearn_ds.markup import visible

TEXTS = [f"document {i}: the quick brown fox jumps over the lazy dog {i * 7919}" for i in range(24)]
SETS = ("forget", "retain", "approximate", "general_retain", "general_evaluation")
RUN = "--domain {name} --data_dir {name}-data --seq_len 48 --num_threads 1"
TRAIN = (
    "train --unlearn_method ascent_plus_descent --target_model_name_or_path {name} " + RUN + " --global_batch_size 12 "
    "--disable_tqdm --run_name {name} --deepspeed zero3"
)
# What is typed in a folder that holds a model and documents of that name, in this order; {name} stands for it.
COMMANDS = {
    "prepare": "prepare --tokenizer_name_or_path {name} --domain {name} --data_dir {name}-data --seq_len 48 --disable_tqdm "
    + " ".join(f"--{one} {{name}}.{one}.jsonl" for one in SETS),
    "prepare again": "prepare --tokenizer_name_or_path {name} --domain {name} --data_dir {name}-data --seq_len 48 "
    "--forget {name}.forget.jsonl --disable_tqdm",
    "inspect": "inspect {name}-data/{name} --seq_len 48 --output_dir {name}-seen --verify",
    "inspect an update": "inspect {name}-data/{name} --seq_len 48 --step 1 --global_batch_size 12 --output_dir {name}-seen",
    "plan": "plan {name}.yaml --nodes 1 --gpus_per_node 1 --gpu h100",
    "train": TRAIN + " --output_dir {name}-run --do_eval --save_steps 1 --max_steps 2",
    "evaluate the original": "evaluate --model_name_or_path {name} --output_dir {name}-original " + RUN,
    "report": "report {name}-run {name}-original --names {name} original --original original --output_dir {name}-report",
    "report of folders": "report {name}-run {name}-original --output_dir {name}-folders",
    "count": "sweep {name}-grid.yaml --count",
    "list": "sweep {name}-grid.yaml",
    "sweep": "sweep {name}-grid.yaml --index 0",
    "collect": "sweep {name}-grid.yaml --collect",
}
# DeepSpeed is started once a process: these run alone, what stands between them in one process.
ENGINES = ("train", "evaluate the original", "sweep")


def words_of(command, name):
    return [word.replace("{name}", name) for word in command.split()]


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A model with a tokenizer, and a process to type into that has everything imported."""
    root = tmp_path_factory.mktemp("names")
    documents = root / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    write_tokenizer(root / "model", [documents], 300)
    config = tiny_config()
    config.vocab_size, config.hidden_size = 300, 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "model")
    server = RankServer(root)
    yield root, server
    server.stop()


def make_inputs(folder, model, name, plain=None):
    """What a user of that taste has in a folder. plain: the name of the model and the domain, if it is another."""
    plain = plain or name
    folder.mkdir()
    shutil.copytree(model, folder / plain)
    for number, one in enumerate(SETS):
        lines = [json.dumps({"text": f"{one} {text[::-1] if number % 2 else text}"}) for text in TEXTS]
        (folder / f"{name}.{one}.jsonl").write_text("\n".join(lines))
    run = {"unlearn_method": "ascent_plus_descent", "target_model_name_or_path": plain, "data_dir": f"{name}-data"}
    run |= {"domain": plain, "seq_len": 48, "global_batch_size": 12, "output_dir": "unused", "num_threads": 1}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
    base = {key: value for key, value in run.items() if key != "domain"} | {
        "max_steps": 1,
        "do_eval": True,
        "deepspeed": "zero3",
    }
    grid = {"output_dir": f"{name}-sweep", "base": base, "grid": {"domain": [plain], "run_name": [name]}}
    del base["output_dir"]
    (folder / f"{name}-grid.yaml").write_text(yaml.safe_dump(grid))


def processes():
    """The commands in order, grouped by what one process may run."""
    groups = [[]]
    for what in COMMANDS:
        groups += [[what], []] if what in ENGINES else []
        if what not in ENGINES:
            groups[-1].append(what)
    return [group for group in groups if group]


def type_commands(server, folder, commands):
    """What commands answer that are typed in a folder, in one process: {"code", "stderr"} of each."""
    files = [folder.parent / "commands.json", folder.parent / "answers.json"]
    files[0].write_text(json.dumps(commands))
    run = server.start([*map(str, files), str(folder)], 1, module="tests.support.try_commands", TRITON_INTERPRET="0")
    assert run.wait() == [0], run.output()[-4000:]
    return json.loads(files[1].read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_every_command_takes_the_name(typed, name):
    root, server = typed
    folder = root / list(NAMES)[list(NAMES.values()).index(name)]
    make_inputs(folder, root / "model", name)
    for together in processes():
        answers = type_commands(server, folder, {what: words_of(COMMANDS[what], name) for what in together})
        failed = {what: answer["stderr"][-1500:] for what, answer in answers.items() if answer["code"] != 0}
        assert not failed

    assert (folder / f"{name}-data" / name / "forget.idx").is_file()
    assert not list(folder.rglob(".*.partial"))
    report = json.loads((folder / f"{name}-report" / "report.json").read_text())
    assert list(report["models"]) == [name, "original"]
    assert table_cells((folder / f"{name}-report" / "report.md").read_text())[0][0] == visible(name)
    folders = json.loads((folder / f"{name}-folders" / "report.json").read_text())
    assert list(folders["models"]) == [f"{name}-run", f"{name}-original"]
    rows = table_cells((folder / f"{name}-run" / "model" / "README.md").read_text())
    for option, value in (("domain", name), ("target_model_name_or_path", name), ("output_dir", f"{name}-run")):
        assert [option, value] in rows
    assert ["forget", "forget"] in [row[:2] for row in rows]
    assert json.loads((folder / f"{name}-run" / "run.json").read_text())["options"]["domain"] == name
    assert len(json.loads((folder / f"{name}-sweep" / "report.json").read_text())["models"]) == 1


NOT_UTF8 = "a\udcff"
REFUSED = ("train", "sweep", "collect")  # a model is written into the folder, by a library that takes UTF-8 alone


@pytest.mark.slow
def test_a_path_that_is_no_utf8_is_taken_or_refused_before_anything_is_done(typed):
    root, server = typed
    folder = root / "bytes"
    make_inputs(folder, root / "model", NOT_UTF8, plain="plain")
    changed = [("_or_path {name}", "_or_path plain"), ("--domain {name}", "--domain plain"), ("a/{name} ", "a/plain ")]
    commands = {}
    for what, command in COMMANDS.items():
        for old, new in changed:
            command = command.replace(old, new)
        commands[what] = command
    commands["report"] = commands["report"].replace("{name}-run {name}-original", "{name}-all {name}-original")
    commands["report of folders"] = commands["report of folders"].replace("{name}-run", "{name}-all")
    more = (
        f"--output_dir {{name}}-all --generate 2 --quantize int8 --relearn 1 --original_model {{name}}-original {RUN}"
    )
    everything = "evaluate --model_name_or_path plain " + more.replace("--domain {name}", "--domain plain")
    for together in processes():
        asked = {what: words_of(commands[what], NOT_UTF8) for what in together}
        if "report" in together:  # of a model measured in every way
            done = type_commands(server, folder, {"everything": words_of(everything, NOT_UTF8)})["everything"]
            assert done["code"] == 0, done["stderr"][-2000:]
        for what, answer in type_commands(server, folder, asked).items():
            assert answer["code"] == (2 if what in REFUSED else 0), (what, answer["stderr"][-1500:])
            if what in ("train", "sweep"):
                assert "-sweep" in answer["stderr"] or "-run" in answer["stderr"]
                assert "this name is not UTF-8" in answer["stderr"].splitlines()[-1]
    names = {path.name.removeprefix(NOT_UTF8) for path in folder.glob("*") if path.is_dir()}
    assert names == {"-all", "-data", "-folders", "-original", "-report", "-seen", "plain"}
    report = json.loads((folder / f"{NOT_UTF8}-report" / "report.json").read_text())
    assert list(report["models"]) == [NOT_UTF8, "original"]
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".html", ".jsonl"):
            path.read_text(encoding="utf-8")


@pytest.mark.parametrize("option", ["prepare --tokenizer", "train --target_model", "evaluate --model"])
def test_a_model_s_path_that_is_no_utf8_is_refused_by_name(option, capsys):
    command, flag = option.split()
    words = {"prepare": ["--forget", "x"], "train": ["--output_dir", "x", "--unlearn_method", "finetune"]}.get(
        command, []
    )
    assert cli.main([command, f"{flag}_name_or_path", f"models/{NOT_UTF8}", *words]) == 2
    said = capsys.readouterr().err
    assert f"{flag}_name_or_path models/a\\udcff: this name is not UTF-8" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("what", ["prepare", "train", "evaluate the original"])
def test_a_name_that_no_file_system_takes_is_refused_by_name(typed, what):
    root, server = typed
    folder = root / what
    make_inputs(folder, root / "model", "short")
    name = "n" * 256
    flag = "--domain" if what == "prepare" else "--output_dir"
    (answer,) = type_commands(server, folder, {what: [*words_of(COMMANDS[what], "short"), flag, name]}).values()
    assert answer["code"] == 2
    line = answer["stderr"].splitlines()[-1]
    assert "error: " in line
    assert "n" * 20 in line
    assert "bytes" in line or "File name too long" in line
    assert "Traceback" not in answer["stderr"]
    assert not list(folder.rglob(".*.partial"))
