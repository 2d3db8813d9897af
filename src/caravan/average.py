"""Average model folders: the mean of their weights, as a new model folder.

    python -m caravan.average runs/seed1/model runs/seed2/model --output runs/average/model
    python -m caravan.average runs/seed1/model runs/seed2/model --output runs/average/model \\
        --evaluate data=beir data.path=my-data data.split=dev name=average/dev

Models that were trained from the same weights with different seeds, data or learning rates can be
averaged (model soups, arXiv 2203.05482). Encoding, architecture and tokenizer must agree, and
adapters must have the same base. Weights are averaged in float32, and stored in their own dtype.

The mean of LoRA matrices A and B is not the mean of the adapters, whose updates are products B A.
The average of n adapters of rank r is therefore an adapter of rank n r with the stacked matrices,
whose product is the mean of the products.

--evaluate also evaluates the members and the average, with settings (key=value) of evaluate.py, in
folders below run_dir, and tests the average against each member over the queries.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caravan import manifests
from caravan.encoding import FILE, read_encoding, write_encoding
from caravan.errors import InputError, OccupiedError, answering, reading
from caravan.files import claimed, replacing_folder
from caravan.models.digests import adapter_base, folder_digest

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
COMPARED = (".json", ".model", ".txt", ".py")  # the tokenizer and remote code
NOT_COMPARED = {
    "transformers_version", "_name_or_path", "_from_model_config", "peft_version", "inference_mode",
    "lora_dropout", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora",
}  # fmt: skip
"""Settings that do not affect the average, or that this module compares or combines itself."""
OF_ONE_MODEL = {"name", "updates", "monitored", "best", "validation"}
"""Facts about a member that do not hold for the average."""

log = logging.getLogger("caravan")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m caravan.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="a model folder")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    evaluate = "evaluate the models and their average, with settings of evaluate.py"
    parser.add_argument("--evaluate", nargs="*", metavar="KEY=VALUE", help=evaluate)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    return answering(lambda: _run(arguments.models, arguments.output, arguments.evaluate))


def _run(models: list[Path], output: Path, settings: list[str] | None) -> None:
    if settings is None:
        average(models, output)
        return
    from caravan.cli.compose import CONF, compose
    from caravan.cli.sources import key_of, quoted

    kind = read_encoding(models[0])[0].kind
    if taken := sorted({key_of(text) for text in settings} & {kind, "collections"}):
        raise InputError(
            "invalid-setting",
            f"--evaluate {taken[0]}=: each model is evaluated as the {kind}, on one collection;"
            f" leave {taken[0]} out",
        )
    model = quoted(f"{kind}={models[0]}")
    cfg = compose(CONF, "evaluate", [*settings, model])  # reports mistakes before any work
    average(models, output)
    _compare([*models, output], cfg, kind)


def _compare(models: Sequence[Path], cfg: DictConfig, kind: str) -> None:
    """Evaluate models below `run_dir`, and test the last against the others over the queries."""
    from caravan.cli.evaluate import evaluate
    from caravan.report.compare import compare
    from caravan.report.evaluations import comparison_tables
    from caravan.report.records import distinct, path_names
    from caravan.report.systems import read_judged, read_system, with_distinct_names
    from caravan.report.tables import show
    from caravan.report.verdict import of_comparison

    paths = [model.resolve() for model in models]
    named = [path_names(path.parent if path.name == "model" else path) for path in paths]
    systems = []
    for model, name in zip(models, distinct(named), strict=True):
        one = copy.deepcopy(cfg)
        one[kind] = str(model)
        one.store = cfg.store  # below the common run_dir
        one.run_dir = str(Path(cfg.run_dir, name))
        with claimed(Path(one.run_dir)):
            evaluate(one)
        systems.append(read_system(Path(one.run_dir)))
    systems, last = with_distinct_names(systems), len(models) - 1
    couples = [(i, last) for i in range(last)]
    comparison = compare(systems, read_judged(systems), couples=couples)
    for table in comparison_tables(comparison):
        show(table)
    show(of_comparison(comparison))


def average(models: Sequence[Path], output: Path) -> None:
    """Average model folders into `output`, unless it holds this average already.

    Raises:
        InputError: "too-few-models"; "settings-differ" with the setting and the two folders;
            "weights-mismatch"; "unsupported-adapter"; "not-finite".
        OccupiedError: `output` exists and is another folder.
    """
    from caravan.export import model_card

    if len({model.resolve() for model in models}) < max(2, len(models)):
        problem = "an average needs at least two model folders, each given once"
        raise InputError("too-few-models", problem)
    facts = _common_facts(models)
    facts["average"] = {str(model): folder_digest(model) for model in models}
    if output.exists():
        made_from = read_encoding(output)[1].get("average") if (output / FILE).exists() else None
        if made_from != facts["average"]:
            problem = f"{output} exists; choose another --output, or delete it"
            raise OccupiedError("output-occupied", problem)
        log.info("%s exists already, from the same models", output)
        model_card.write(output)  # a kill may have left the folder without it
        return
    with replacing_folder(output) as scratch:
        for path in sorted(models[0].glob("[!.]*")):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, scratch / path.name)
        scales = None
        if facts["weights"] == "adapter":
            scales = _stack_configs(models, output, scratch)
        _write_weights(models, scratch, scales)
        write_encoding(scratch, read_encoding(models[0])[0], facts)
    model_card.write(output)
    log.info("model folder %s, the average of %d models", output, len(models))


def _common_facts(models: Sequence[Path]) -> dict[str, Any]:
    """The facts that all models share; raises "settings-differ" if they cannot be averaged."""
    first, *others = models
    settings, facts = _settings(first)
    for other in others:
        other_settings, other_facts = _settings(other)
        for name in settings | other_settings:
            if settings.get(name) != other_settings.get(name):
                raise InputError(
                    "settings-differ",
                    f"{name} differs between {first} and {other}; average models with the same"
                    " settings",
                )
        facts = {key: value for key, value in facts.items() if other_facts.get(key) == value}
    return {key: value for key, value in facts.items() if key not in OF_ONE_MODEL}


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings that must agree, by the name in messages, and the facts of the model."""
    from caravan.models.folder import BASE_WEIGHTS
    from caravan.models.remote_code import FACT

    encoding, facts = read_encoding(folder)
    found = {"weights (full or adapter)": facts["weights"], "remote code": bool(facts.get(FACT))}
    found |= {f"encoding.{name}": value for name, value in asdict(encoding).items()}
    if facts["weights"] == "adapter":
        base, revision = adapter_base(folder)
        where = str(Path(base).resolve()) if Path(base).is_dir() else base
        # Older folders have no digest of the weights.
        found["the base of the adapter"] = facts.get(BASE_WEIGHTS) or [where, revision]
    for path in sorted(folder.glob("[!.]*")):
        if path.name in CONFIGS:
            for name, value in _json(path).items():
                is_set = name == "target_modules" and isinstance(value, list)
                if name not in NOT_COMPARED:
                    found[f"{path.name}: {name}"] = sorted(value) if is_set else value
        elif path.suffix in COMPARED and path.name != FILE and ".index." not in path.name:
            found[path.name] = manifests.content_digest(path)
    return found, facts


def _json(path: Path) -> dict[str, Any]:
    with reading(path, "not a config"):
        return dict(json.loads(path.read_text("utf-8")))


def _stack_configs(models: Sequence[Path], output: Path, scratch: Path) -> list[float]:
    """Write the config of the stacked adapters, whose matrices contain their factors.

    Returns:
        The factor of each adapter's product B A.

    Raises:
        InputError: "unsupported-adapter", an update is not such a product, or factors vary.
    """
    scales, ranks = [], []
    for model in models:
        path = model / "adapter_config.json"
        config = _json(path)
        for name in ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern"):
            if config.get(name):
                raise InputError(
                    "unsupported-adapter",
                    f"{path}: adapters with {name} cannot be averaged; merge them first (python -m"
                    " caravan.export transformers)",
                )
        rank = config["r"]
        ranks.append(rank)
        scales.append(config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank))
    config = _json(models[0] / "adapter_config.json")
    config |= {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False}  # a factor of 1
    base = Path(adapter_base(models[0])[0])
    if base.is_dir() and Path.cwd() not in output.resolve().parents:
        base = base.resolve()
    config["base_model_name_or_path"] = str(base)
    manifests.write_json(scratch / "adapter_config.json", config)
    return scales


def _write_weights(models: Sequence[Path], scratch: Path, scales: list[float] | None) -> None:
    """Write the averages, file by file; `scales`: factors of adapters, None for full weights.

    Raises:
        InputError: "weights-mismatch", names, shapes or dtypes differ; "not-finite".
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from caravan.models.loading import check_finite

    with ExitStack() as files:
        members: list[dict[str, Any]] = []  # the open file of each weight, by name
        shards: dict[str, list[str]] = {}  # the weights in each file of the first model
        for model in models:
            member: dict[str, Any] = {}
            for path in sorted(model.glob("[!.]*.safetensors")):
                with reading(path, "its weights cannot be read"):
                    file = files.enter_context(safe_open(path, framework="pt"))
                member |= dict.fromkeys(file.keys(), file)
                if not members:
                    shards[path.name] = list(file.keys())
            members.append(member)
            if other := sorted(member.keys() ^ members[0].keys()):
                raise InputError(
                    "weights-mismatch",
                    f"{models[0]} and {model} do not have the same weights ({other[0]}); average"
                    " models of one architecture",
                )
        for file_name, names in shards.items():
            averages = {}
            for name in names:
                weights = [member[name].get_tensor(name) for member in members]
                for model, weight in zip(models, weights, strict=True):
                    check_finite(str(model), {name: weight})
                averages[name] = _mean(name, dict(zip(models, weights, strict=True)), scales)
            save_file(averages, scratch / file_name, metadata={"format": "pt"})


def _mean(name: str, members: Mapping[Path, Tensor], scales: list[float] | None) -> Tensor:
    """The average of a weight; of the two matrices of adapters, the stack."""
    import torch

    weights = list(members.values())
    found = re.search(r"lora_(?:embedding_)?([AB])\b", name) if scales else None
    rank_at = None if found is None else "AB".index(found[1])  # [r, in] and [out, r]
    kinds = {(of.dtype, *(n for at, n in enumerate(of.shape) if at != rank_at)) for of in weights}
    if len(kinds) > 1:
        raise InputError(
            "weights-mismatch",
            f"{name} differs in shape or dtype between {', '.join(map(str, members))}; average"
            " models of one architecture and dtype",
        )
    dtype = weights[0].dtype
    if rank_at == 0:
        return torch.cat(weights)
    if rank_at == 1:
        assert scales is not None
        factors = [scale / len(weights) for scale in scales]
        parts = [of.float() * factor for of, factor in zip(weights, factors, strict=True)]
        return torch.cat(parts, dim=1).to(dtype)
    if not dtype.is_floating_point:
        return weights[0]
    total = weights[0].float()
    for weight in weights[1:]:
        total = total + weight.float()
    return (total / len(weights)).to(dtype)


if __name__ == "__main__":
    sys.exit(main())
