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
from collections.abc import Iterator, Sequence
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

    from caravan.report.compare import Comparison

CONF = Path(__file__).resolve().parents[2] / "conf"
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
    cfg = _composed(models[0], settings)  # reports mistakes before any work
    average(models, output)
    from caravan.report.evaluations import comparison_tables
    from caravan.report.tables import show
    from caravan.report.verdict import of_comparison

    comparison = compare_with_members(models, output, cfg)
    for table in comparison_tables(comparison):
        show(table)
    show(of_comparison(comparison))


def _composed(model: Path, settings: list[str]) -> DictConfig:
    """The config of the evaluation of a model."""
    from caravan.cli.compose import compose
    from caravan.cli.sources import key_of, quoted

    kind = read_encoding(model)[0].kind
    given = {key_of(text) for text in settings}
    if taken := sorted(given & {kind, "collections"}):
        raise InputError(
            "invalid-setting",
            f"--evaluate {taken[0]}=: each model is evaluated as the {kind}, on one collection;"
            f" leave {taken[0]} out",
        )
    return compose(CONF, "evaluate", [*settings, quoted(f"{kind}={model}")])


def compare_with_members(models: Sequence[Path], output: Path, cfg: DictConfig) -> Comparison:
    """Evaluate models and their average in folders below `run_dir`, and test them over the queries.

    Args:
        cfg: a checked config of `evaluate.py`; its retriever or reranker is replaced.

    Returns:
        Each model, then the average, which is tested against the others (p after Holm).
    """
    from caravan.cli.evaluate import evaluate
    from caravan.report.compare import compare
    from caravan.report.records import distinct, path_names
    from caravan.report.systems import read_judged, read_system, with_distinct_names

    folders = [*models, output]
    paths = [one.resolve() for one in folders]
    named = [path_names(path.parent if path.name == "model" else path) for path in paths]
    systems = []
    for folder, name in zip(folders, distinct(named), strict=True):
        one = copy.deepcopy(cfg)
        one[read_encoding(folder)[0].kind] = str(folder)
        one.store = cfg.store  # below the common run_dir
        one.run_dir = str(Path(cfg.run_dir, name))
        with claimed(Path(one.run_dir)):
            evaluate(one)
        systems.append(read_system(Path(one.run_dir)))
    systems = with_distinct_names(systems)
    return compare(systems, read_judged(systems), against=len(models))


def average(models: Sequence[Path], output: Path) -> None:
    """Average model folders into `output`, unless it holds this average already.

    Raises:
        InputError: "too-few-models"; "settings-differ" with the setting and the two folders;
            "weights-mismatch"; "unsupported-adapter".
        OccupiedError: `output` exists and is another folder.
    """
    from caravan.export import model_card

    if len(models) < 2:
        raise InputError("too-few-models", "an average needs at least two model folders")
    if len({model.resolve() for model in models}) < len(models):
        raise InputError("too-few-models", "a model folder is given twice; list each folder once")
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
    adapters = facts["weights"] == "adapter"
    with replacing_folder(output) as scratch:
        for path in sorted(models[0].glob("[!.]*")):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, scratch / path.name)
        if adapters:
            _write_adapter_config(models, output, scratch)
        _write_weights(models, scratch, _scales(models) if adapters else None)
        write_encoding(scratch, read_encoding(models[0])[0], facts)
    model_card.write(output)
    log.info("model folder %s, the average of %d models", output, len(models))


def _common_facts(models: Sequence[Path]) -> dict[str, Any]:
    """The facts that all models share; raises "settings-differ" if they cannot be averaged."""
    first = models[0]
    encoding, facts = read_encoding(first)
    for other in models[1:]:
        other_encoding, other_facts = read_encoding(other)
        found = dict(_settings(other, other_encoding, other_facts))
        for name, value in _settings(first, encoding, facts):
            if found.pop(name, None) != value:
                _refuse(name, first, other)
        for name in found:
            _refuse(name, first, other)
        facts = {key: value for key, value in facts.items() if other_facts.get(key) == value}
    return {key: value for key, value in facts.items() if key not in OF_ONE_MODEL}


def _settings(folder: Path, encoding: Any, facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of all settings that must agree."""
    from caravan.models.folder import BASE_WEIGHTS
    from caravan.models.remote_code import FACT

    yield "weights (full or adapter)", facts["weights"]
    yield "remote code", bool(facts.get(FACT))
    for name, value in asdict(encoding).items():
        yield f"encoding.{name}", value
    if facts["weights"] == "adapter":
        base, revision = adapter_base(folder)
        where = str(Path(base).resolve()) if Path(base).is_dir() else base
        digest = facts.get(BASE_WEIGHTS)  # older folders have none
        yield "the base of the adapter", digest or [where, revision]
    for path in sorted(folder.glob("[!.]*")):
        if path.name in CONFIGS:
            for name, value in _json(path).items():
                if name not in NOT_COMPARED:
                    is_set = name == "target_modules" and isinstance(value, list)
                    yield f"{path.name}: {name}", sorted(value) if is_set else value
        elif path.suffix in COMPARED and path.name != FILE and ".index." not in path.name:
            yield path.name, manifests.content_digest(path)


def _refuse(name: str, first: Path, other: Path) -> None:
    raise InputError(
        "settings-differ",
        f"{name} differs between {first} and {other}; average models with the same settings",
    )


def _json(path: Path) -> dict[str, Any]:
    with reading(path, "not a config"):
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return dict(found)


def _scales(models: Sequence[Path]) -> list[float]:
    """The factor of each adapter's product B A.

    Raises:
        InputError: "unsupported-adapter", an update is not such a product, or factors vary.
    """
    scales = []
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
        scales.append(config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank))
    return scales


def _write_adapter_config(models: Sequence[Path], output: Path, scratch: Path) -> None:
    """Write the config of the stacked adapters, whose matrices contain their factors."""
    config = _json(models[0] / "adapter_config.json")
    rank = sum(_json(model / "adapter_config.json")["r"] for model in models)
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}  # a factor of 1
    base = Path(adapter_base(models[0])[0])
    if base.is_dir() and Path.cwd() not in output.resolve().parents:
        base = base.resolve()
    config["base_model_name_or_path"] = str(base)
    manifests.write_json(scratch / "adapter_config.json", config)


def _write_weights(models: Sequence[Path], scratch: Path, scales: list[float] | None) -> None:
    """Write the averages, file by file; `scales`: factors of adapters, None for full weights.

    Raises:
        InputError: "weights-mismatch", names, shapes or dtypes differ; "not-finite".
    """
    from contextlib import ExitStack

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from caravan.models.loading import check_finite

    def mean(name: str, weights: list[torch.Tensor]) -> torch.Tensor:
        found = re.search(r"lora_(?:embedding_)?([AB])\b", name) if scales else None
        rank_at = None if found is None else "AB".index(found[1])  # [r, in] and [out, r]
        dtype, shapes = weights[0].dtype, [list(weight.shape) for weight in weights]
        if rank_at is not None:
            for shape in shapes:
                shape.pop(rank_at)
        if any(of != shapes[0] for of in shapes) or any(of.dtype != dtype for of in weights):
            raise InputError(
                "weights-mismatch",
                f"{name} differs in shape or dtype between {', '.join(map(str, models))}; average"
                " models of one architecture and dtype",
            )
        if rank_at == 0:
            return torch.cat(weights)
        if rank_at == 1:
            assert scales is not None
            factors = [scale / len(weights) for scale in scales]
            parts = [w.float() * factor for w, factor in zip(weights, factors, strict=True)]
            return torch.cat(parts, dim=1).to(dtype)
        if not dtype.is_floating_point:
            return weights[0]
        total = weights[0].float()
        for weight in weights[1:]:
            total = total + weight.float()
        return (total / len(weights)).to(dtype)

    with ExitStack() as files:
        members: list[dict[str, Any]] = []
        for model in models:
            members.append({})
            for path in sorted(model.glob("[!.]*.safetensors")):
                with reading(path, "its weights cannot be read"):
                    file = files.enter_context(safe_open(path, framework="pt"))
                members[-1] |= dict.fromkeys(file.keys(), (path.name, file))
        for model, member in zip(models, members, strict=True):
            if other := sorted(member.keys() ^ members[0].keys()):
                raise InputError(
                    "weights-mismatch",
                    f"{models[0]} and {model} do not have the same weights ({other[0]}); average"
                    " models of one architecture",
                )
        for file_name in sorted({name for name, _ in members[0].values()}):
            averages = {}
            for key, (name, _) in members[0].items():
                if name == file_name:
                    weights = [member[key][1].get_tensor(key) for member in members]
                    for model, weight in zip(models, weights, strict=True):
                        check_finite(str(model), {key: weight})
                    averages[key] = mean(key, weights).contiguous()
            save_file(averages, scratch / file_name, metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
