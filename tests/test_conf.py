"""The files of conf/: each composes and checks, its commands start, its values are in range."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from tests.small_conf import CONF

from caravan.cli import schema
from caravan.cli.checking.walk import Mistake
from caravan.cli.compose import Composer, compose, without_hydra
from caravan.cli.preflight import preflight
from caravan.errors import InputError


def real_mistakes(composer: Composer, overrides: list[str]) -> list[Mistake]:
    """What is wrong, but for what is the user's to give: `???` and folders of their own."""
    found = schema.mistakes(without_hydra(composer.compose(overrides)), composer.root)
    return [mistake for mistake in found if mistake.kind == "wrong"]


QUICK = {"negatives", "rerank_depth", "search"}
COMMAND = re.compile(r"^# *python (?:-m caravan\.)?(train|evaluate|search)(?:\.py)? (.+)$", re.M)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Program and overrides of the commands that a file's head tells to run."""
    found = []
    for program, line in COMMAND.findall(text):
        given = shlex.split(line)
        if "--ask" in given:  # what search takes beside settings
            given = given[: given.index("--ask")]
        found.append((program, given))
    return found


def launch_command(text: str) -> tuple[str, list[str]] | None:
    """The program and the overrides of the command that a file opens with."""
    return next(iter(commands(text)), None)


def command_for(path: Path) -> tuple[str, list[str]]:
    """The root and the overrides that bring a file of conf/ into a config."""
    group, option = "/".join(path.parts[:-1]), path.stem
    if path.parts[0] in ("experiment", "sweep"):
        launched = launch_command((CONF / path).read_text())
        assert launched is not None, f"{path} does not open with the command that runs it"
        name = "/".join((*path.parts[1:-1], option))
        assert f"{path.parts[0]}={name}" in launched[1], f"{path} opens with another command"
        return launched
    if (launched := launch_command((CONF / path).read_text())) is not None:
        return launched
    root = "evaluate" if option in ("evaluate", "pipeline") or group == "fuse" else "train"
    required = ["retriever=bm25"] if root == "evaluate" else []
    return root, [f"{group}={option}", *required] if group else required


def test_every_yaml_under_conf_composes_and_checks() -> None:
    by_root: dict[str, list[tuple[Path, list[str]]]] = {root: [] for root in schema.ROOTS}
    for path in sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml")):
        root, overrides = command_for(path)
        by_root[root].append((path, [text for text in overrides if text != "-m"]))
    seen, wrong = 0, []
    for root, files in by_root.items():
        with Composer(CONF, root, schema.ROOTS[root]) as composer:
            for path, overrides in files:
                wrong += [(str(path), mistake) for mistake in real_mistakes(composer, overrides)]
                seen += 1
    assert not wrong
    assert seen == sum(1 for path in CONF.rglob("*") if path.suffix in (".yaml", ".yml"))
    assert seen >= 29


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK))
        for path in sorted((CONF / "sweep").glob("*.yaml"))
    ],
)
def test_every_sweep_starts_with_the_command_it_opens_with(path: Path) -> None:
    root, overrides = command_for(path.relative_to(CONF))
    assert overrides[0] == "-m"
    _starts(root, [x for x in overrides if not x.startswith(("data.path=", "backbone.name="))])


def _starts(root: str, given: list[str]) -> None:
    """All jobs compose and check, but for runs, models and data that are not here."""
    try:
        assert preflight(given, CONF, root, schema.ROOTS[root])[: len(given)] == given
    except InputError as error:
        lines = str(error).splitlines()[1:]
        assert lines
        assert all("there is no" in line for line in lines), lines


def test_a_plugin_that_is_not_installed_is_named() -> None:
    with pytest.raises(InputError, match=r"no hydra/sweeper/ax; .*hydra-ax-sweeper"):
        preflight(["-m", "seed=1,2", "hydra/sweeper=ax"], CONF, "train", schema.Train)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("trainer.max_step=5", "trainer.max_steps"),
        ("+trainr.max_steps=5", "trainer.max_steps"),
        ("backbone=tiny_lama", "backbone=tiny_llama"),
        ("trainer.max_steps=abc", "an int"),
        ("data.path=/nonexistent data=beir", "there is no file or folder /nonexistent"),
        ("loss.temprature=0.1", "temperature"),
        ("seed=x", "an int"),
        ("stage=retreiver", "stage=retriever"),
        ("optimizer._target_=caravan.training.optim.AdamV", "caravan.training.optim.AdamW"),
        ("callbacks.best.moniter=val/MRR@10", "callbacks.best.monitor"),
        ("index.facotry=Flat", "index.factory"),
        ("callbacks.best.monitor=val/nope", "nothing logs val/nope; "),
        ("callbacks.best.monitor=nope", "there are val/MRR@10, val/nDCG@10, val/R@100, train/loss"),
        ("callbacks=early_stopping callbacks.early_stopping.monitor=val/loss", "nothing logs"),
        ("callbacks.best.monitor=train/ebae", "nothing logs train/ebae"),
    ],
)
def test_mistakes_over_the_real_conf(overrides: str, wanted: str) -> None:
    with pytest.raises(InputError) as caught:
        preflight(overrides.split(), CONF, "train", schema.Train)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2, lines
    assert wanted in lines[1]


@pytest.mark.parametrize(
    "overrides",
    [
        "callbacks.best.monitor=train/loss callbacks.best.mode=min",
        "callbacks=early_stopping callbacks.early_stopping.monitor=train/accuracy",
        "stage=adaptation backbone.max_length=512 callbacks.best.monitor=train/ebae",
        "callbacks.best.monitor=mine/score +callbacks.mine._target_=tests.fitting.Losses",
    ],
)
def test_what_the_stage_logs_can_be_monitored(overrides: str) -> None:
    with Composer(CONF, "train", schema.Train) as composer:
        told = composer.collect(overrides.split())[1]
    assert not [line for line in told if "monitor" in line]


@pytest.mark.parametrize(
    ("experiment", "reader"),
    [
        ("papers/repllama_passage", "MsMarcoPassage"),
        ("papers/rankllama_document", "MsMarcoDocument"),
        ("llara/finetune_document", "MsMarcoDocument"),
        ("eval/msmarco_passage", "MsMarcoPassage"),
        ("eval/msmarco_document", "MsMarcoDocument"),
        ("eval/beir", "Beir"),
    ],
)
def test_experiments_on_ms_marco_read_its_own_files(experiment: str, reader: str) -> None:
    root = "evaluate" if experiment.startswith("eval") else "train"
    own = ["retriever=bm25"] if root == "evaluate" else []
    with Composer(CONF, root, schema.ROOTS[root]) as composer:
        cfg = composer.compose([f"experiment={experiment}", *own])
    assert cfg.data._target_.rpartition(".")[2] == reader
    assert cfg.data.split == ("test" if reader == "Beir" else "dev")


def test_a_backbone_brings_its_own_encoding() -> None:
    cfg = compose(CONF, "train", ["backbone=minilm"])
    assert (cfg.encoding.pooling, cfg.encoding.append_eos) == ("mean", False)
    given = compose(CONF, "train", ["backbone=minilm", "encoding.pooling=cls"])
    assert given.encoding.pooling == "cls"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("stage=adaptation stage.words=0", "stage.words (command line): it must be at least 1"),
        ("validation.read_lengths=[64,2]", "validation.read_lengths[1] (command line): it must be"),
        ("loss.temperature=inf", "loss.temperature (command line): it is inf"),
        ("seed=-1", "seed (command line): it must be at least 0, not -1"),
        ("optimizer.lr=0", "optimizer.lr (command line): it must be a finite number above 0"),
        ("optimizer.lr=-1e-4", "it must be a finite number above 0, not -0.0001"),
        ("optimizer.lr=inf", "it must be a finite number above 0, not inf"),
        ("optimizer.lr=nan", "it must be a finite number above 0, not nan"),
        ("optimizer.betas=[0.9,1.0]", "it must be two numbers from 0 to below 1, not [0.9, 1.0]"),
        ("optimizer.warmup_steps=-1", "it must be at least 0, not -1"),
        ("backbone.heads=0", "backbone.heads (command line): it must be at least 1, not 0"),
        ("backbone.layers=0", "it must be at least 1, not 0"),
        ("backbone.hidden_size=0", "it must be at least 1, not 0"),
        ("backbone.hidden_size=260", "it must be a multiple of twice the heads (8), not 260"),
        ("backbone.intermediate_size=0", "it must be at least 1, not 0"),
        ("backbone.vocab_size=0", "it must be at least 1, not 0"),
        ("trainer.val_check_interval=0", "it must be at least 1, not 0"),
        ("trainer.val_check_interval=0.5", "it counts batches over all epochs: it must be a whole"),
        (
            "trainer.val_check_interval=1.5 trainer.check_val_every_n_epoch=1",
            "or a part of an epoch up to 1.0, not 1.5",
        ),
        ("trainer.log_every_n_steps=0", "it must be at least 1, not 0"),
        ("trainer.accumulate_grad_batches=0", "it must be at least 1, not 0"),
        ("trainer.devices=0", "trainer.devices (command line): it must be at least 1, or -1"),
        ("callbacks.last.every_n_steps=0", "it must be at least 1, not 0"),
        ("peft=lora peft.rank=0", "peft.rank (command line): it must be at least 1, not 0"),
        ("callbacks.evaluation.measures=[]", "callbacks.evaluation.measures"),
        ("trainer.max_steps=-5", "it must be at least -1, not -5"),
        ("name=", "it is empty; give the run a name of its own"),
        ("callbacks.best.save_top_k=3", "the checkpoints would overwrite each other"),
        ("loss=kl", "KL learns from a teacher's scores; give a run with them: sampler.teacher"),
        ("sampler.teacher_margin=0", "it needs the scores of a run; set sampler.teacher"),
        ("loss=likelihood", "wants scores that are log probabilities"),
        ("stage=reranker loss=likelihood validation.run=x.trec", "stage=reranker_likelihood"),
        ("stage=reranker sampler.number=0", "sampler.number (command line): a reranker compares"),
        ("stage=reranker_likelihood encoding.pair=pair", "leave it joined"),
        ("encoding.bidirectional=true", "it is what backbone.bidirectional is; set that"),
        ("stage=adaptation backbone.bidirectional=true", "a decoder that looks to the left; set"),
        ("stage=reranker_likelihood backbone.bidirectional=true", "set backbone.bidirectional=fal"),
        ("index=exact index.query_chunk=0", "it must be at least 1, not 0"),
        ("index=exact index.passage_chunk=0", "it must be at least 1, not 0"),
    ],
)
def test_values_that_would_end_in_a_traceback_are_told_before(override: str, wanted: str) -> None:
    with pytest.raises(InputError, match=re.escape(wanted)):
        preflight(override.split(), CONF, "train", schema.ROOTS["train"])


def test_what_looks_both_ways_says_so_in_its_encoding() -> None:
    for backbone in ("tiny_llama", "smollm2_135m", "minilm"):
        for both in (False, True):
            given = ["backbone.bidirectional=true"] if both else []
            cfg = compose(CONF, "train", [f"backbone={backbone}", *given])
            assert cfg.encoding.bidirectional is cfg.backbone.bidirectional is both


def test_an_evaluation_without_measures_is_refused() -> None:
    with pytest.raises(InputError, match=r"measures .*it is empty; write \[MRR@10\]"):
        preflight(["retriever=bm25", "measures=[]"], CONF, "evaluate", schema.ROOTS["evaluate"])


@pytest.mark.parametrize(
    "override",
    [
        "trainer.val_check_interval=0.5 trainer.check_val_every_n_epoch=1",
        "trainer.devices=-1",
        "trainer.devices=auto",
        "optimizer.warmup_steps=0",
        "optimizer.betas=[0,0.95]",
    ],
)
def test_values_at_the_edge_are_right(override: str) -> None:
    given = override.split()
    assert preflight(given, CONF, "train", schema.ROOTS["train"]) == given


def test_the_names_that_a_check_knows_are_those_that_are_computed() -> None:
    from caravan.cli.rules import values
    from caravan.retrieval import metrics

    assert values.MEASURES == metrics.NAMES
    for name in values.MEASURES:
        for text in (f"{name}@10", f"{name}(rel=2)@10", f"{name}@0", f"x{name}@1"):
            try:
                metrics.parse_measure(text)
            except InputError:
                assert values.MEASURE.fullmatch(text) is None, text
            else:
                assert values.MEASURE.fullmatch(text), text


def test_a_dataset_of_the_hub_is_no_folder() -> None:
    preflight(["experiment=llara/adapt"], CONF, "train", schema.ROOTS["train"])
    for path in ("/no/such", "no/such/texts"):  # an id has an owner and a name
        with pytest.raises(InputError, match=f"there is no file or folder {path}"):
            preflight(
                ["stage=adaptation", "data=hub_texts", f"data.path={path}"],
                *(CONF, "train", schema.ROOTS["train"]),
            )
    for reader in ("tevatron", "flagembedding"):
        given = [f"data={reader}", "data.path=org/rows"]
        assert preflight(given, CONF, "train", schema.ROOTS["train"]) == given
        with pytest.raises(InputError, match=r"there is no file or folder rows\.jsonl"):
            preflight(
                [f"data={reader}", "data.path=rows.jsonl"], CONF, "train", schema.ROOTS["train"]
            )


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("-m seed=1,2 trainer.devices=2", "each of which would sweep again"),
        ("-m trainer.devices=1,2", r"each of which would sweep again.*\[in the job"),
        ("-m seed=1,2 trainer.num_nodes=2", "each of which would sweep again"),
        ("-m seed=1,2 trainer.devices=[0]", None),
        ("-m seed=1,2", None),
    ],
)
def test_a_sweep_in_one_process_has_one_device(overrides: str, told: str | None) -> None:
    given = overrides.split()
    if told is None:
        preflight(given, CONF, "train", schema.ROOTS["train"])
        return
    with pytest.raises(InputError, match=f"(?s){told}"):
        preflight(given, CONF, "train", schema.ROOTS["train"])


def test_a_launcher_whose_package_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = ["-m", "seed=1,2", "hydra/launcher=slurm"]
    with pytest.raises(InputError, match="pip install hydra-submitit-launcher"):
        preflight(given, CONF, "train", schema.ROOTS["train"])


def test_a_choice_that_another_file_sets_to_null_is_told() -> None:
    with pytest.raises(InputError, match=r"(?s)loss=kl .*adaptation\.yaml:\d+ sets loss to null"):
        preflight(["stage=adaptation", "loss=kl"], CONF, "train", schema.ROOTS["train"])
    preflight(["stage=adaptation", "~loss"], CONF, "train", schema.ROOTS["train"])
    preflight(["stage=adaptation", "peft=none"], CONF, "train", schema.ROOTS["train"])


def test_a_sweep_is_not_started_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started together, and a sweep is one"):
        preflight(["-m", "seed=1,2"], CONF, "train", schema.ROOTS["train"])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("trainer.devices=64", "32 queries cannot be shared out over 64 ranks; set it to 64 or"),
        ("trainer.devices='64'", "32 queries cannot be shared out over 64 ranks"),
        ("trainer.devices=8 trainer.num_nodes=8", "32 queries cannot be shared out over 64 ranks"),
        ("trainer.devices=64 trainer.max_steps=0", None),
        ("peft=qlora backbone=qwen3_0_6b strategy=fsdp", "four bits cannot be shared out over"),
        ("stage=adaptation backbone=modernbert_base", "ModernBERT-base is an encoder, and LLaRA"),
        ("peft=qlora backbone=qwen3_0_6b strategy=ddp", None),
        ("peft=qlora", "this backbone begins from random ones"),
        ("stage=adaptation gradcache.chunk=4", "compares no texts with one another"),
        ("backbone.attention=flash_attention_2 trainer.accelerator=cpu", "runs on GPUs alone"),
        ("stage=adaptation backbone.attention=unpadded", "under masks of their own; set it to"),
        (
            "stage=reranker_likelihood validation.run=src backbone.attention=unpadded",
            "likelihoods are padded; set it to auto",
        ),
        ("backbone.attention=unpadded", None),
        ("backbone.attention=unpaded", "no attention is called unpaded; did you mean unpadded?"),
        ("backbone.compile=true strategy=fsdp", "copies of layers that are not compiled"),
        ("backbone.compile=true backbone.checkpointing=selective", "is torch.compile's choice"),
        ("backbone.checkpointing=selected", "true or false or one of selective"),
        ("gradcache.chunk=0", "must be at least 1"),
        (
            "stage=reranker validation.train_queries=5 validation.run=src",
            "candidates are those of dev queries",
        ),
    ],
)
def test_what_cannot_work_together_is_told_with_the_remedy(
    overrides: str, told: str | None
) -> None:
    with Composer(CONF, "train", schema.ROOTS["train"]) as composer:
        found = [mistake.text for mistake in real_mistakes(composer, shlex.split(overrides))]
    if told is None:
        assert not found
    else:
        assert len(found) == 1
        assert told in found[0]


@pytest.mark.parametrize(("kind", "decodes"), [("bert", False), ("bert", True), ("llama", True)])
def test_an_encoder_in_a_folder_is_not_adapted(kind: str, decodes: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "is_decoder": decodes}))
    given = ["stage=adaptation", "backbone=hf", f"backbone.name={tmp_path}"]
    with Composer(CONF, "train", schema.ROOTS["train"]) as composer:
        told = [str(mistake) for mistake in real_mistakes(composer, given)]
    assert any("is an encoder, and LLaRA adapts decoders" in text for text in told) != decodes
