"""What the entries for training and evaluating detectors share: the command line, and errors in one line."""

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.model import is_model_wrapper
from mmengine.registry import OPTIMIZERS
from mmengine.runner import Runner
from torch import nn

from ..configs.schema import ConfigError
from ..configs.schema.fields import reject_unknown
from ..engine import NonFiniteLossError
from ..models import CheckpointError
from .backbone import DynamicBackbone
from .bridge import MissingOperatorError


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of both entries."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="configuration of mmdetection; detection/configs has some")
    parser.add_argument(
        "--work-dir", metavar="FOLDER", help="where to write; default: work_dirs/ and the config's name"
    )
    parser.add_argument("--data-root", metavar="FOLDER", help="where the data is, in place of the config's data_root")
    parser.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        help="turn images as their EXIF orientation says, or take them as they are stored; default: the config's",
    )
    parser.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how processes started"
    )
    parser.add_argument(
        "--cfg-options",
        metavar="KEY=VALUE",
        nargs="+",
        action=_Options,
        default={},
        help="fields that win over the config's, such as optim_wrapper.accumulative_counts=4",
    )
    return parser


class _Options(DictAction):
    """mmengine's reading of KEY=VALUE, with an error of the parser for any other word."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *args: Any) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"argument --cfg-options: expected KEY=VALUE, found {value!r}")
        super().__call__(parser, namespace, values, *args)


def read_config(options: argparse.Namespace) -> Config:
    """Read the configuration that the command line names, with the fields that win over it.

    Raises:
        ConfigError: No such file, one that cannot be read, or an unknown key.
    """
    path = Path(options.config)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; detection/configs has some")
    with _one_line(f"{path}: cannot be read"):
        config = Config.fromfile(path)
    if "model" not in config:
        raise ConfigError(f"{path}: describes no 'model'")
    check_keys(config, options.cfg_options)
    with _one_line("--cfg-options"):
        config.merge_from_dict(options.cfg_options)
    if options.data_root:
        set_data_root(config, options.data_root)
    if options.exif:
        colours = "color" if options.exif == "apply" else "color_ignore_orientation"
        config.merge_from_dict(_with_loaders(config.to_dict(), colours))
    paramwise = config.get("optim_wrapper", {}).get("paramwise_cfg")
    if paramwise is not None and "constructor" not in config.optim_wrapper:
        paramwise.setdefault("bypass_duplicate", True)  # of what layers of the backbone share
    config.launcher = options.launcher
    config.work_dir = options.work_dir or config.get("work_dir") or str(Path("work_dirs") / path.stem)
    return config


def check_keys(config: Config, keys: Mapping[str, Any]) -> None:
    """Refuse dotted keys that nothing reads, which mmengine would add silently.

    A new key may be added where something checks it: in a dictionary with a `type`, whose class knows its arguments,
    and at the top among the fields of mmengine's runner.

    Raises:
        ConfigError: Another new key; the nearest known one is named.
    """
    for key in keys:
        node: Any = config
        for part in key.split("."):
            items = _items(node)
            if part.isdigit() and int(part) < len(items):
                node = items[int(part)]
                continue
            known = list(getattr(node, "keys", list)())
            if node is config:
                known += inspect.signature(Runner).parameters
            if part in known and part in node:
                node = node[part]
                continue
            if part not in known and "type" not in known:
                reject_unknown([part], known or ["0"], f"--cfg-options {key}")
            break


def _items(node: Any) -> Sequence[Any]:
    """What a list of a configuration holds; nothing for anything else."""
    return node if isinstance(node, list | tuple) else ()


def set_data_root(config: Config, folder: str) -> None:
    """Replace `data_root` at the beginning of every path of the configuration.

    Raises:
        ConfigError: The configuration has no `data_root`.
    """
    old, new = (config.get("data_root") or "").rstrip("/"), folder.rstrip("/")
    if not old:
        raise ConfigError(f"--data-root: {config.filename} names no data_root that could be replaced")

    def replaced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: replaced(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(replaced, value))
        inside = isinstance(value, str) and f"{value}/".startswith(f"{old}/")
        return new + value[len(old) :] if inside else value

    config.merge_from_dict(replaced(config.to_dict()))


def _with_loaders(node: Any, colours: str) -> Any:
    """A part of a configuration in which every image is loaded with this `color_type`."""
    if isinstance(node, Mapping):
        changed = {k: _with_loaders(v, colours) for k, v in node.items()}
        loads = node.get("type") in ("LoadImageFromFile", "mmdet.LoadImageFromFile")
        return {**changed, "color_type": colours} if loads else changed
    return type(node)(_with_loaders(v, colours) for v in node) if isinstance(node, list | tuple) else node


def check_data(config: Config, *loops: str) -> None:
    """Look for the files that the loops "train", "val" or "test" read, before anything is built.

    Raises:
        ConfigError: A file or folder is not there; the message names the field.
    """
    for loop in loops:
        dataset = (config.get(f"{loop}_dataloader") or {}).get("dataset", {})
        while "dataset" in dataset:  # of a wrapper, such as RepeatDataset
            dataset = dataset["dataset"]
        root = Path(dataset.get("data_root") or "")
        fields = {f"{loop}_dataloader.dataset.ann_file": dataset.get("ann_file") and root / dataset["ann_file"]}
        for name, folder in dataset.get("data_prefix", {}).items():
            fields[f"{loop}_dataloader.dataset.data_prefix.{name}"] = root / folder
        evaluator = config.get(f"{loop}_evaluator")
        if isinstance(evaluator, Mapping):
            fields[f"{loop}_evaluator.ann_file"] = evaluator.get("ann_file")
        for name, path in fields.items():
            if path and "://" not in str(path) and not Path(path).exists():
                raise ConfigError(f"field '{name}': no such file or folder: {path}; --data-root says where the data is")


def build_runner(config: Config) -> Runner:
    """Build mmengine's runner with its model.

    Raises:
        ConfigError: Something that cannot be built, or a neck that does not take what the backbone gives.
        MissingOperatorError: A module calls an operator that the bridge lacks.
    """
    with _one_line(f"{config.filename}: cannot be built"):
        runner = Runner.from_cfg(config)
    model = unwrap(runner.model)
    backbone, widths = getattr(model, "backbone", None), getattr(getattr(model, "neck", None), "in_channels", None)
    if isinstance(backbone, DynamicBackbone) and widths is not None and list(widths) != list(backbone.out_channels):
        raise ConfigError(
            f"field 'model.neck.in_channels': {list(widths)}, but the levels {backbone.levels} of 'out_indices' of the "
            f"backbone have the channels {list(backbone.out_channels)}"
        )
    return runner


def build_loops(runner: Runner, *loops: str) -> None:
    """Build what the runner would build only when it runs: the data of "train", "val" or "test", and the optimizer.

    Raises:
        ConfigError: Something that cannot be built, or no such loop in the configuration.
    """
    path = runner.cfg.filename
    for loop in loops:
        if runner.cfg.get(f"{loop}_dataloader") is None:
            raise ConfigError(f"{path}: has no {loop}_dataloader")
        with _one_line(f"{path}: cannot be built"):
            getattr(runner, f"{loop}_loop")
    if "train" in loops:
        name = runner.cfg.optim_wrapper.optimizer.type
        if isinstance(name, str) and name not in OPTIMIZERS:
            raise ConfigError(f"field 'optim_wrapper.optimizer.type': mmengine has no optimizer {name!r}")
        with _one_line(f"{path}: cannot be built"):
            runner.optim_wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)


def unwrap(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel or another wrapper."""
    return model.get_submodule("module") if is_model_wrapper(model) else model


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what mmengine and mmdet raise for a configuration into a `ConfigError` that names it."""
    try:
        yield
    except (ConfigError, CheckpointError, MissingOperatorError):
        raise
    except Exception as e:  # mmengine lets every error of a configuration's own code through
        text = str(e).strip().split("\n")[0] or "no reason given"
        raise ConfigError(f"{what}: {type(e).__name__}: {text}") from e


def run(main: Callable[[], None]) -> int:
    """Run an entry; print what is the user's to correct in one line, and return the exit status.

    It is 0 when all is done, 1 for a training that diverged, and 2 for what cannot begin.
    """
    try:
        main()
    except (ConfigError, CheckpointError, MissingOperatorError) as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    except NonFiniteLossError as e:
        sys.stderr.write(f"error: {e}\n")
        return 1
    return 0
